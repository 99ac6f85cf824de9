import copy

import pytest
import torch
from torch import nn

from arbllm.embedding import Int8Embedding, Int8Linear
from arbllm.format.rows import dequantize_rows
from arbllm.kernels import cpu, row_tiles, rows

IDS = torch.tensor([[3, 0, 9], [9, 9, 1]])


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    embed_scale: torch.Tensor

    def __init__(self, rows, columns, padding_idx):
        super().__init__(rows, columns, padding_idx)
        self.register_buffer("embed_scale", torch.tensor(5.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


@pytest.fixture(params=[nn.Embedding, ScaledEmbedding])
def dense(request):
    torch.manual_seed(0)
    return request.param(10, 6, padding_idx=9).requires_grad_(False)


def rounded(packed, dtype=torch.float32):
    return dequantize_rows(packed.codes, packed.scales, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_embedding_does_what_its_class_does(dense, dtype):
    twin = copy.deepcopy(dense)
    packed = Int8Embedding.from_dense(dense).to(dtype)
    twin.weight.data = rounded(packed)
    found = packed(IDS)
    assert found.dtype == dtype
    torch.testing.assert_close(found, twin.to(dtype)(IDS), rtol=0, atol=0)


def test_tokens_that_are_not_there_are_refused(dense):
    for ids in (torch.tensor([-1]), torch.tensor([dense.num_embeddings])):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            Int8Embedding.from_dense(copy.deepcopy(dense))(ids)


def test_an_embedding_is_close_to_the_dense_one(dense):
    expected = dense(IDS)
    torch.testing.assert_close(Int8Embedding.from_dense(dense)(IDS), expected, rtol=0, atol=0.06)


def test_back_to_dense(dense):
    kind = type(dense)
    packed = Int8Embedding.from_dense(dense)
    expected, weight = packed(IDS), rounded(packed)
    again = packed.to_dense(torch.float32)
    assert (type(again), again.padding_idx, again.num_embeddings) == (kind, 9, 10)
    assert list(again.state_dict()) == ["weight"]
    assert torch.equal(again.weight, weight)
    assert torch.equal(again(IDS), expected)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_casts_leave_codes_and_scales(dense, cast):
    packed = Int8Embedding.from_dense(dense)
    codes, scales = packed.codes.clone(), packed.scales.clone()
    cast(nn.Sequential(packed))
    assert packed.codes.dtype == torch.int8
    assert packed.scales.dtype == torch.float16
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.scales, scales)
    assert list(packed.state_dict()) == ["codes", "scales"]


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def head(request):
    torch.manual_seed(0)
    return nn.Linear(6, 10, bias=request.param).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile_weights", [1, 18, 2**20])
def test_a_head_is_the_dense_layer_tile_by_tile(head, dtype, tile_weights, monkeypatch):
    monkeypatch.setattr(row_tiles, "CPU_TILE_WEIGHTS", tile_weights)
    packed = Int8Linear.from_dense(head)
    head.weight.data = rounded(packed)
    x = torch.randn(2, rows.MOST_TOKENS, 6).to(dtype)
    found = packed.to(dtype)(x)
    assert found.dtype == dtype
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found.float(), head.float()(x.float()), **tolerance)
    assert packed.scales.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_head_is_the_dense_layer_for_a_few_tokens(head, dtype):
    packed = Int8Linear.from_dense(head)
    head.weight.data = rounded(packed)
    x = torch.randn(2, 3, 6).to(dtype)
    found = packed.to(dtype)(x)
    assert found.dtype == dtype
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(found.double(), head.double()(x.double()), rtol=tolerance, atol=tolerance)


def test_a_head_is_the_same_without_its_kernel(head, monkeypatch):
    packed, x = Int8Linear.from_dense(head), torch.randn(3, 6)
    expected = packed(x)
    monkeypatch.setattr(cpu, "available", lambda: False)
    torch.testing.assert_close(packed(x), expected)


def test_a_head_is_one_graph(head):
    packed, x = Int8Linear.from_dense(head), torch.randn(3, 6)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), packed(x))


def test_gradients_reach_the_input_of_a_head(head):
    packed = Int8Linear.from_dense(head)
    x = torch.randn(4, 6, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, rounded(packed).sum(0).expand(4, 6))


def test_a_tied_head_has_no_tensors_of_its_own(head):
    shared = Int8Embedding.from_dense(nn.Embedding(10, 6))
    model = nn.ModuleList([shared, Int8Linear(shared.layout, head, shared)])
    assert {name for name in model.state_dict() if not name.endswith("bias")} == {"0.codes", "0.scales"}
    twin = copy.deepcopy(model)
    x = torch.randn(3, 6)
    expected = x @ rounded(shared).T + (0 if head.bias is None else head.bias)
    shared.codes.zero_()
    torch.testing.assert_close(twin[1](x), expected)  # the copy's head belongs to the copy's embedding
    assert not (model[1](x) - (0 if head.bias is None else head.bias)).any()


def test_a_head_back_to_dense(head):
    packed = Int8Linear.from_dense(head)
    again = packed.to_dense(torch.bfloat16)
    assert torch.equal(again.weight, rounded(packed, torch.bfloat16))
    assert again.bias is head.bias


def test_printed_forms():
    assert "10, 6, bits=8" in repr(Int8Embedding.from_dense(nn.Embedding(10, 6)))
    assert "in_features=6, out_features=10, bits=8, tied=False" in repr(Int8Linear.from_dense(nn.Linear(6, 10)))
