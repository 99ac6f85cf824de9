"""Tests of Triton kernels that need an interpreter or a GPU: `test_triton.py` runs this file in a process of its own.

With TRITON_INTERPRET=1 they run on the CPU, else on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import triton as kernel
from arbllm.kernels import triton_configuration
from arbllm.kernels.triton_layout import LONGEST_RUN
from tests.helpers import random_packed
from tests.kernels.triton_matrices import MATRICES, in_segments

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
MANY, DENSE = {"few": 0, "many": 64}, {"few": 0, "many": 0}


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several programs even for small matrices."""
    use(monkeypatch, few=16, many=64)


def use(monkeypatch, few: int, many: int) -> None:
    default = triton_configuration.load("any")
    chosen = replace(
        default,
        few=replace(default.few, most_tokens=few, rows=16),
        many=replace(default.many, most_tokens=many, tokens=16, rows=16),
        dense=replace(default.dense, rows=16),
    )
    monkeypatch.setattr(kernel, "configuration_of", lambda device: chosen)


def check(matrix: BinaryMatrix, x: torch.Tensor) -> None:
    y = kernel.matmul(x.to(DEVICE), matrix.map(lambda tensor: tensor.to(DEVICE))).cpu()
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], matrix.layout.rows)
    dense = matrix.dequantize().double()
    scale = (x.double().abs() @ dense.abs().T).clamp(min=1e-6)
    assert ((y.double() - x.double() @ dense.T).abs() <= TOLERANCE[x.dtype] * scale).all()


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [
        ("arb-rcx", 1, torch.bfloat16),
        ("arb-rcx", 17, torch.float32),
        ("arb-rcx of four bits", 3, torch.float16),
        ("outliers alone", 2, torch.float32),
        ("arb-rc", 8, torch.float16),
        ("arb-x", 2, torch.float32),
        ("four groups", 5, torch.bfloat16),
        ("no groups", 1, torch.float32),
        ("trellis of few signs", 1, torch.float32),
        ("trellis of three signs", 3, torch.bfloat16),
        ("trellis of four signs", 2, torch.float32),
        ("trellis of many rows", 1, torch.float32),
        ("trellis and plain", 1, torch.float16),
        ("trellis and plain", 5, torch.float32),
        ("trellis, float16", 2, torch.float32),
    ],
)
def test_straight_from_the_bits(monkeypatch, name, tokens, dtype):
    use(monkeypatch, few=17, many=64)
    matrix = MATRICES[name]()
    check(matrix, inputs(tokens, matrix.layout.columns, dtype))


@pytest.mark.parametrize("launch", [MANY, DENSE], ids=["in registers", "written out"])
@pytest.mark.parametrize(
    ("name", "tokens", "dtype"),
    [
        ("arb-rcx", 17, torch.bfloat16),
        ("outliers alone", 2, torch.float16),
        ("arb-rc", 3, torch.float32),
        ("arb-x", 5, torch.float16),
        ("four groups", 2, torch.float32),
        ("trellis of few signs", 2, torch.float32),
        ("trellis of many rows", 2, torch.float32),
        ("trellis and plain", 17, torch.float16),
        ("trellis and plain", 3, torch.float32),
        ("trellis, float16", 2, torch.float32),
    ],
)
def test_by_weights(monkeypatch, launch, name, tokens, dtype):
    use(monkeypatch, **launch)
    matrix = MATRICES[name]()
    check(matrix, inputs(tokens, matrix.layout.columns, dtype))


@pytest.mark.parametrize("columns", [320, 576, 64 * (LONGEST_RUN + 8)])
def test_widths_of_real_models(columns):
    check(in_segments(9, (columns, 2, 1)), inputs(1, columns, torch.float32))


def test_written_out_in_pieces(monkeypatch):
    use(monkeypatch, **DENSE)
    chosen = kernel.configuration_of(torch.device(DEVICE))
    tiny = replace(chosen, dense=replace(chosen.dense, scratch_megabytes=0))
    monkeypatch.setattr(kernel, "configuration_of", lambda device: tiny)
    check(in_segments(11, (40, 2, 1), (24, 1, 2)), inputs(2, 64, torch.float32))
    check(in_segments(53, (9, 1, 4, True)), inputs(2, 9, torch.float32))


def test_inputs_of_all_sizes_and_zeros():
    x = inputs(3, 64, torch.float32)
    x[1], x[2] = 0, x[2] * 1e-9
    x[0, :8] *= 1e6
    check(in_segments(9, (64, 2, 1)), x)


def test_any_strides_and_leading_dimensions():
    matrix = in_segments(9, (40, 2, 1), (24, 1, 2))
    check(matrix, torch.randn(64, 2, 1).permute(2, 1, 0))
    check(matrix, torch.randn(1, 64).expand(2, 64))
    check(matrix, torch.randn(64))
    check(matrix, torch.randn(2, 0, 64))


def test_other_dtypes_and_gradients_take_the_reference_kernel():
    matrix = in_segments(9, (64, 2, 1)).map(lambda tensor: tensor.to(DEVICE))
    x = torch.randn(2, 64, dtype=torch.float64, device=DEVICE, requires_grad=True)
    kernel.matmul(x, matrix).sum().backward()
    torch.testing.assert_close(x.grad, matrix.dequantize(torch.float64).sum(0).expand(2, 64))


def test_new_contents_are_seen():
    matrix, other = in_segments(9, (64, 2, 1)), random_packed(in_segments(9, (64, 2, 1)).layout, seed=1)
    x = inputs(1, 64, torch.float32)
    check(matrix, x)
    for name, tensor in matrix.tensors().items():
        tensor.copy_(other.tensors()[name])
    check(matrix, x)


def test_other_scales_of_the_same_signs_are_seen():
    matrix, x = in_segments(48, (64, 2, 1)), inputs(2, 64, torch.float32)
    check(matrix, x)
    rows, columns = matrix.scales()
    check(matrix.with_scales(3 * rows, columns), x)
    check(matrix, x)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match="inputs have 63 columns, the packed weight has 64"):
        kernel.matmul(torch.randn(2, 63, device=DEVICE), in_segments(48, (64, 2, 1)))


def test_operator():
    matrix = in_segments(9, (64, 2, 1), (20, 1, 4, True)).map(lambda tensor: tensor.to(DEVICE))
    stored, numbers = list(matrix.tensors().values()), kernel._numbers(matrix.layout)
    arguments = inputs(2, 84, torch.float32).to(DEVICE), stored, numbers
    torch.library.opcheck(torch.ops.arbllm.triton_matmul.default, arguments)


def test_is_traced_whole():
    matrix = in_segments(9, (40, 2, 1), (24, 1, 2)).map(lambda tensor: tensor.to(DEVICE))
    x = inputs(2, 64, torch.float32).to(DEVICE)
    traced = torch.compile(lambda x: kernel.matmul(x, matrix), backend="eager", fullgraph=True)
    assert torch.equal(traced(x), kernel.matmul(x, matrix))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_in_cuda_graphs_and_compiled():
    matrix = in_segments(256, (512, 2, 1), (256, 2, 2)).map(lambda tensor: tensor.to(DEVICE))
    x = inputs(1, 768, torch.bfloat16).to(DEVICE)
    expected = kernel.matmul(x, matrix)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.matmul(x, matrix)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(torch.compile(partial(kernel.matmul, matrix=matrix), fullgraph=True)(x), expected)
