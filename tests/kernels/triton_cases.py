"""Tests of Triton kernels that need an interpreter or a GPU: `test_triton.py` runs this file in a process of its own.

With TRITON_INTERPRET=1 they run on the CPU, else on a GPU.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch

from arbllm import nn
from arbllm.format.matrix import BinaryMatrix
from arbllm.format.rows import dequantize_rows, quantize_rows
from arbllm.kernels import cuda, dispatch, triton_configuration, triton_products, triton_rows
from arbllm.kernels import triton as kernel
from arbllm.kernels.triton_plan import plan_of
from tests.helpers import random_packed
from tests.kernels.triton_matrices import MATRICES, in_segments

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Of an output, over what it would be if all its terms were positive."""
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of all outputs (norms): they themselves, weights that are written out, and inputs of 16 bits. The interpreter cuts
numbers off that become bfloat16, which is twice what rounding would be."""
LEVELS = {1: 1e-5, 2: 1.2e-3, 3: 2.9e-3, 4: 3.8e-3}
"""What levels of so many signs are off by as bytes, see `triton_layout.LARGEST_LEVEL`."""
MANY, DENSE = {"few": 0, "many": 64}, {"few": 0, "many": 0}


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several programs even for small matrices."""
    use(monkeypatch, few=16, many=64)


def use(monkeypatch, few: int, many: int, early: bool = False) -> None:
    default, small = triton_configuration.load("any"), {"rows": 64, "warps": 4, "early": early}
    chosen = replace(
        default,
        few=replace(default.few, most_tokens=few, tokens=4, words=2, most_rows=128, programs=8, **small),
        many=replace(default.many, least_tokens=few + 1, most_tokens=many, tokens=16, programs=4, stages=2, **small),
        dense=replace(default.dense, rows=16),
    )
    monkeypatch.setattr(kernel, "configuration_of", lambda device: chosen)


def check(matrix: BinaryMatrix, x: torch.Tensor) -> None:
    y = cuda.multiply(
        x.to(DEVICE), kernel.prepare(matrix.map(lambda tensor: tensor.to(DEVICE))), matrix.layout.rows
    ).cpu()
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], matrix.layout.rows)
    dense = matrix.dequantize().double()
    scale = (x.double().abs() @ dense.abs().T).clamp(min=1e-6)
    expected = x.double() @ dense.T
    assert ((y.double() - expected).abs() <= TOLERANCE[x.dtype] * scale).all()
    levels = max((LEVELS[s.terms] for s in matrix.layout.segments if s.trellis and x.dtype != torch.float32), default=0)
    assert (y.double() - expected).norm() <= (ROUNDING[x.dtype] + levels) * expected.norm()


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


PLAIN = [
    ("arb-rcx", 1, torch.bfloat16),
    ("arb-rcx", 5, torch.float16),
    ("arb-rcx of four bits", 3, torch.float16),
    ("outliers alone", 2, torch.float16),
    ("arb-rc", 3, torch.float16),
    ("arb-x", 2, torch.float16),
    ("four groups", 3, torch.bfloat16),
    ("no groups", 1, torch.float16),
    ("codes of rows alone", 3, torch.float16),
    ("codes of rows and means", 2, torch.float16),
    ("four groups of two signs and means", 1, torch.float16),
    ("many small segments", 3, torch.float16),
    ("trellis and plain", 3, torch.float16),
    ("trellis, float16", 2, torch.float16),
]
TRELLIS = [
    ("trellis of few signs", 17, torch.bfloat16),
    ("trellis of three signs", 3, torch.bfloat16),
    ("trellis of four signs", 2, torch.bfloat16),
    ("trellis of many rows", 1, torch.bfloat16),
    ("trellis of many rows", 5, torch.bfloat16),
    ("trellis of many columns", 2, torch.float16),
    ("trellis of scales in float16", 2, torch.float16),
]


@pytest.fixture
def runs(monkeypatch):
    """Which of the kernels ran."""
    found = []

    def noted(name, function):
        def run(*arguments):
            found.append(name)
            return function(*arguments)

        return run

    for name in ("multiply_few", "multiply_many", "multiply_dense"):
        monkeypatch.setattr(triton_products, name, noted(name, getattr(triton_products, name)))
    return found


@pytest.mark.parametrize(("name", "tokens", "dtype"), [*PLAIN, *TRELLIS])
def test_bytes_four_at_a_time(monkeypatch, runs, name, tokens, dtype):
    use(monkeypatch, few=17, many=64)
    matrix = MATRICES[name]()
    check(matrix, inputs(tokens, matrix.layout.columns, dtype))
    assert runs == ["multiply_few"]


@pytest.mark.parametrize(("name", "tokens", "dtype"), TRELLIS)
def test_levels_on_tensor_cores(monkeypatch, runs, name, tokens, dtype):
    use(monkeypatch, **MANY)
    matrix = MATRICES[name]()
    check(matrix, inputs(tokens, matrix.layout.columns, dtype))
    assert runs == ["multiply_many"]


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU of capability 9.0"
)
@pytest.mark.parametrize("launch", [{"few": 16, "many": 64}, MANY], ids=["few", "many"])
def test_programs_that_begin_early_wait_for_their_inputs(monkeypatch, launch):
    matrix = in_segments(70, (60, 1, 2, True), (9, 1, 3, True), (1, 1, 1))
    ready = kernel.prepare(matrix.map(lambda tensor: tensor.to(DEVICE)))
    results = []
    for early in (False, True):
        use(monkeypatch, **launch, early=early)
        y = inputs(3, 70, torch.bfloat16).to(DEVICE)
        for _ in range(4):  # each reads what the one before has just written
            y = cuda.multiply(y, ready, 70)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [*TRELLIS, *PLAIN, *[(name, 3, torch.float32) for name, *_ in [*TRELLIS, *PLAIN[1:]]]],
)
def test_weights_written_out(monkeypatch, runs, name, tokens, dtype):
    use(monkeypatch, **(DENSE if dtype != torch.float32 else MANY))
    matrix = MATRICES[name]()
    check(matrix, inputs(tokens, matrix.layout.columns, dtype))
    assert runs == ["multiply_dense"]


@pytest.mark.parametrize("launch", [{"few": 16, "many": 64}, MANY, DENSE], ids=["few", "many", "written out"])
@pytest.mark.parametrize("trellis", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_so_in_the_outputs_of_its_token_alone(monkeypatch, launch, trellis, value):
    use(monkeypatch, **launch)
    matrix = in_segments(64, (40, 1, 2, trellis), (1, 1, 1))
    x = inputs(3, 41, torch.float16)
    x[1, 5] = value
    ready = kernel.prepare(matrix.map(lambda tensor: tensor.to(DEVICE)))
    y = cuda.multiply(x.to(DEVICE), ready, 64).isfinite().cpu()
    assert not y[1].any()
    assert y[[0, 2]].all()


@pytest.mark.parametrize("name", ["arb-rc", "outliers alone", "trellis and plain"])
def test_without_a_trellis_weights_are_written_out_for_many_tokens(monkeypatch, runs, name):
    use(monkeypatch, **MANY)
    matrix = MATRICES[name]()
    check(matrix, inputs(3, matrix.layout.columns, torch.float16))
    assert runs == ["multiply_dense"]


@pytest.mark.parametrize("columns", [320, 576, 1536])
def test_widths_of_real_models(columns):
    check(in_segments(9, (columns, 2, 1)), inputs(1, columns, torch.float16))


def test_levels_are_not_rounded_where_this_is_asked_for():
    matrix = MATRICES["trellis of three signs"]()
    x, dense = inputs(2, matrix.layout.columns, torch.float16), matrix.dequantize().double()
    ready = kernel.prepare(matrix.map(lambda tensor: tensor.to(DEVICE)))
    y, rounded = (cuda.multiply(x.to(DEVICE), ready, matrix.layout.rows, exact=exact).cpu() for exact in (True, False))
    expected = x.double() @ dense.T
    assert (y.double() - expected).norm() < 5e-4 * expected.norm()
    assert 1e-3 * expected.norm() < (rounded.double() - expected).norm() < 6e-3 * expected.norm()


def test_written_out_in_pieces(monkeypatch):
    use(monkeypatch, **DENSE)
    chosen = kernel.configuration_of(torch.device(DEVICE))
    tiny = replace(chosen, dense=replace(chosen.dense, scratch_megabytes=0))
    monkeypatch.setattr(kernel, "configuration_of", lambda device: tiny)
    check(in_segments(11, (40, 2, 1), (24, 1, 2)), inputs(2, 64, torch.float32))
    check(in_segments(53, (9, 1, 4, True)), inputs(2, 9, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_of_all_sizes_and_zeros(dtype):
    x = inputs(3, 64, dtype)
    x[1], x[2] = 0, x[2] * 1e-9
    x[0, :8] *= 1e6
    check(in_segments(9, (64, 2, 1)), x)


def test_any_strides_and_leading_dimensions():
    matrix = in_segments(9, (40, 2, 1), (24, 1, 2))
    check(matrix, torch.randn(64, 2, 1).permute(2, 1, 0))
    check(matrix, torch.randn(1, 64).expand(2, 64))
    check(matrix, torch.randn(64))
    check(matrix, torch.randn(2, 0, 64))


@pytest.mark.parametrize("launch", [{"few": 3, "many": 16}, {"few": 3, "many": 0}], ids=["many", "few alone"])
@pytest.mark.parametrize("trellis", [False, True])
def test_a_prepared_matrix_has_all_work_divided(monkeypatch, trellis, launch):
    """CUDA graphs may not record that this is done."""
    use(monkeypatch, **launch)
    matrix = in_segments(70, (90, 1, 2, trellis), (40, 1, 1, trellis), (1, 1, 1))
    layout = matrix.layout
    ready = kernel.prepare(matrix.map(lambda tensor: tensor.to(DEVICE)))
    plan = plan_of(layout)
    divided = dict(plan._kept)
    for tokens, dtype in ((1, torch.float32), (3, torch.bfloat16), (16, torch.float16), (17, torch.bfloat16)):
        cuda.multiply(inputs(tokens, layout.columns, dtype).to(DEVICE), ready, layout.rows)
    assert plan._kept.keys() == divided.keys()


def test_inputs_of_another_width_are_refused():
    ready = kernel.prepare(in_segments(48, (64, 2, 1)).map(lambda tensor: tensor.to(DEVICE)))
    with pytest.raises(ValueError, match="inputs have 63 columns, the packed weight has 64"):
        cuda.multiply(torch.randn(2, 63, device=DEVICE), ready, 48)


def test_operator():
    ready = kernel.prepare(in_segments(9, (64, 2, 1), (20, 1, 4, True)).map(lambda tensor: tensor.to(DEVICE)))
    arguments = inputs(2, 84, torch.float16).to(DEVICE), *ready, False
    torch.library.opcheck(torch.ops.arbllm.triton_matmul.default, arguments)


@pytest.fixture
def layer(monkeypatch):
    """A layer that takes the Triton kernel wherever it is."""
    monkeypatch.setattr(nn, "preparing_kernel", lambda x: dispatch.preparing_kernel(x) and cuda)
    return nn.BinaryLinear.from_matrix(in_segments(48, (64, 2, 1)), torch.randn(48)).to(DEVICE)


def dense(layer, x):
    return (x.cpu() @ layer.matrix.map(torch.Tensor.cpu).dequantize().T + layer.bias.cpu()).to(x.device)


def test_a_layer_has_its_bits_on_the_gpu_once(layer):
    stored, x = {name: tensor.clone() for name, tensor in layer.state_dict().items()}, torch.randn(2, 64).to(DEVICE)
    y = layer(x)
    torch.testing.assert_close(y, dense(layer, x), rtol=1e-4, atol=1e-4)
    assert all(tensor.is_cpu for tensor in layer.buffers())
    assert all(torch.equal(layer.state_dict()[name].cpu(), tensor.cpu()) for name, tensor in stored.items())
    prepared = layer._prepared
    assert torch.equal(layer(x), y)
    assert layer._prepared is prepared
    assert torch.equal(copy.deepcopy(layer)(x), y)  # whose packed tensors are on the CPU, its bias on the GPU
    assert torch.equal(layer.to(DEVICE)(x), y)


def test_a_layer_computes_gradients_after_it_was_prepared(layer):
    x = torch.randn(2, 64, device=DEVICE)
    layer(x)
    y = layer(x.requires_grad_())
    torch.testing.assert_close(y, dense(layer, x))
    y.sum().backward()
    torch.testing.assert_close(x.grad.cpu(), layer.matrix.dequantize().sum(0).expand(2, 64), rtol=1e-4, atol=1e-4)


def test_new_contents_are_seen(layer):
    x, other = torch.randn(2, 64, device=DEVICE), random_packed(layer.layout, seed=1)
    layer(x)
    for name, tensor in layer.matrix.tensors().items():
        tensor.copy_(other.tensors()[name])
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-4)
    rows, columns = layer.matrix.scales()
    layer.row_scales = layer.matrix.with_scales(3 * rows, columns).row_scales
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-4, atol=1e-4)


def test_a_layer_is_traced_whole(layer):
    x = inputs(2, 64, torch.float32).to(DEVICE)
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(traced(x), layer(x))
    assert all(tensor.is_cpu for tensor in layer.buffers())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_in_cuda_graphs_and_compiled(layer):
    x = inputs(1, 64, torch.bfloat16).to(DEVICE)
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 17])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 70), (100, 576)])
def test_rows_of_bytes(height, width, tokens, dtype):
    codes, scales = quantize_rows(torch.randn(height, width, generator=torch.Generator().manual_seed(height)))
    x = inputs(tokens, width, dtype)
    y = triton_rows.multiply(*(tensor.to(DEVICE) for tensor in (x, codes, scales))).cpu()
    assert y.dtype == dtype
    assert y.shape == (tokens, height)
    dense = dequantize_rows(codes, scales, torch.float64)
    allowed = TOLERANCE[dtype] * (x.double().abs() @ dense.abs().T)
    assert ((y.double() - x.double() @ dense.T).abs() <= allowed + 1e-6).all()


def test_rows_of_bytes_refuse_inputs_of_another_width():
    codes, scales = quantize_rows(torch.ones(3, 8))
    with pytest.raises(ValueError, match="7"):
        triton_rows.multiply(torch.ones(1, 7), codes, scales)
