from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck
from torch.func import functional_call

from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError
from arbllm.format.layout import Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.nn import BinaryLinear
from arbllm.solver import quantize_matrix
from arbllm.tunable import TunableLinear
from tests.helpers import in_segments, random_matrix
from tests.strategies import SEEDS, matrices

LAYOUTS = [
    {"ordering": ordering, "scale_bits": bits, "groups": groups, "salient_groups": other, "salient": salient}
    for ordering, bits, groups, other, salient in (
        ("bitmap", 16, 2, 4, 5),
        ("segments", 8, 1, 2, 9),
        ("explicit", 8, 4, 1, 3),
        ("natural", 8, 4, 2, 0),
        ("bitmap", 8, 2, 2, 22),
    )
]
MATRICES: dict[str, Callable[[], BinaryMatrix]] = {
    **{
        f"{options['ordering']}-{options['scale_bits']}-{options['groups']}": partial(
            random_matrix, 6, 22, block_size=8, **options
        )
        for options in LAYOUTS
    },
    **{
        f"trellis-{bits}": partial(
            in_segments,
            6,
            Segment(9, 1, 3, True),
            Segment(7, 2, 1),
            Segment(6, 1, 1, True),
            ordering="segments",
            scale_bits=bits,
        )
        for bits in (8, 16)
    },
}


@pytest.fixture(params=MATRICES)
def matrix(request) -> BinaryMatrix:
    return MATRICES[request.param]()


def changed(layer: TunableLinear, size: float = 0.3) -> TunableLinear:
    """The layer with other scales."""
    generator = torch.Generator().manual_seed(1)
    for change in (layer.row_changes, layer.column_changes):
        change.data = size * torch.randn(change.shape, generator=generator)
    return layer


@settings(max_examples=40)
@given(matrix=matrices(), seed=SEEDS)
def test_forward_is_the_packed_layer(matrix, seed):
    if not matrix.layout.column_scaled or matrix.layout.row_means:
        with pytest.raises(ConfigError, match="arb-rc and arb-rcx"):
            TunableLinear(matrix)
        return
    generator = torch.Generator().manual_seed(seed)
    x, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 3, matrix.shape[1]), matrix.shape[:1]))
    expected = torch.nn.functional.linear(x, matrix.dequantize(), bias)
    torch.testing.assert_close(TunableLinear(matrix, bias)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(matrix, dtype):
    x, bias = torch.randn(3, 22).to(dtype), torch.randn(6).to(dtype)
    y = TunableLinear(matrix, bias)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, BinaryLinear.from_matrix(matrix, bias)(x), rtol=0.02, atol=0.02)


def test_autocast_changes_neither_dtype_nor_gradients(matrix):
    x, layer = torch.randn(3, 22, requires_grad=True), TunableLinear(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, matrix.dequantize().sum(0).expand(3, 22))


def test_gradients_are_those_of_finite_differences(matrix):
    layer = TunableLinear(matrix).double()
    x = torch.randn(2, 22, dtype=torch.float64, requires_grad=True)

    def forward(rows, columns, x):
        return functional_call(layer, {"row_changes": rows, "column_changes": columns}, (x,))

    changes = [change.detach().clone().requires_grad_() for change in changed(layer).double().parameters()]
    assert gradcheck(forward, (*changes, x))


def test_untouched_scales_give_the_same_matrix(matrix):
    once = TunableLinear(matrix).to_matrix()
    torch.testing.assert_close(once.dequantize(), matrix.dequantize(), rtol=1e-3, atol=1e-3)
    # Codes go by each slot's largest scale, as the solver leaves them: from there on nothing changes.
    again = TunableLinear(once).to_matrix()
    assert again.layout == once.layout == matrix.layout
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in once.tensors().items())


@pytest.mark.parametrize(
    "config",
    [
        BinarizationConfig(bits=2.9),
        BinarizationConfig(bits=2.9, trellis=False),
        BinarizationConfig("arb-rc", block_size=16),
    ],
)
def test_a_matrix_of_the_solver_comes_back_as_it_is(config):
    generator = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(24, 40, generator=generator), torch.randn(80, 40, generator=generator)
    solved = quantize_matrix(weight, inputs.T @ inputs, config)
    again = TunableLinear(solved).to_matrix()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in solved.tensors().items())


def test_changed_scales_are_rounded_as_they_are_stored(matrix):
    layer = changed(TunableLinear(matrix))
    tuned = layer.to_matrix()
    assert all(
        torch.equal(tuned.tensors()[name], tensor)
        for name, tensor in matrix.tensors().items()
        if not name.endswith("scales") and name != "scale_steps"
    )
    # 1.5 % a scale in 8 bits; of a weight with two terms, of both together.
    step = 0.03 if matrix.layout.scale_bits == 8 else 2e-3
    (rows, columns), (wanted_rows, wanted_columns) = tuned.scales(), layer.scales()
    torch.testing.assert_close(rows / rows.amax(0), wanted_rows / wanted_rows.amax(0), rtol=step, atol=1e-6)
    dense = layer(torch.eye(22)).T.detach()
    assert float((tuned.dequantize() - dense).norm() / dense.norm()) < step / 2
    assert float((matrix.dequantize() - dense).norm() / dense.norm()) > 0.1
    torch.testing.assert_close(layer.scales()[0], matrix.scales()[0] * layer.row_changes.exp())
    assert columns.shape == wanted_columns.shape


def test_only_scales_are_trained(matrix):
    layer = TunableLinear(matrix, torch.nn.Parameter(torch.randn(6)))
    assert [name for name, _ in layer.named_parameters()] == ["row_changes", "column_changes"]
    layer(torch.randn(4, 22)).square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in layer.parameters())


def test_training_recovers_scales_that_were_spoiled(matrix):
    x = torch.randn(64, 22, generator=torch.Generator().manual_seed(2))
    wanted = BinaryLinear.from_matrix(matrix)(x)
    layer = changed(TunableLinear(matrix))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        loss = (layer(x) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("method", ["billm", "arb", "arb-x"])
def test_methods_without_column_scales_are_refused(method):
    matrix = quantize_matrix(torch.randn(8, 16), torch.eye(16), BinarizationConfig(method))
    with pytest.raises(ConfigError, match="choose one of these"):
        TunableLinear(matrix)
