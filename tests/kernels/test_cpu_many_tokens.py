"""Products of more tokens than are multiplied in 8 bits: in bfloat16 where that is allowed, else in float32."""

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arbllm.device import float32_precision
from arbllm.kernels import cpu
from tests.helpers import in_segments, random_matrix
from tests.kernels.cpu_products import inputs, relative_error
from tests.kernels.test_cpu import FEATURES, KINDS, TRELLISES
from tests.strategies import matrices

pytestmark = pytest.mark.skipif(not cpu.available(), reason="arbllm was installed without its C++ kernels")

ROUNDING = 2**-8
"""Of a product whose factors, and itself, have been rounded to bfloat16: root mean square; three times that at most."""


def of_this_name(name, rows):
    if name in FEATURES:
        return random_matrix(rows, 320, **FEATURES[name])
    return in_segments(rows, *TRELLISES[name], ordering="explicit", scale_bits=8)


@pytest.fixture(autouse=True)
def _fused():
    if not cpu.takes_more():
        pytest.skip("this processor multiplies many tokens by unpacked weights")


@pytest.fixture
def medium():
    with float32_precision("medium"):
        yield


@pytest.mark.parametrize("rows", [1, 64, 300])
@pytest.mark.parametrize("name", [*FEATURES, *TRELLISES])
def test_all_features_are_multiplied(name, rows):
    matrix = of_this_name(name, rows)
    prepared, dense = cpu.prepare(matrix), matrix.dequantize().double()
    for tokens in (65, 66, 100, 263):
        x = inputs(tokens, matrix.layout.columns, seed=tokens).bfloat16()
        y = cpu.multiply(x, prepared, rows)
        assert y.dtype == torch.bfloat16
        assert y.shape == (tokens, rows)
        assert relative_error(y, x.double() @ dense.T) < ROUNDING


@pytest.mark.parametrize("tokens", [70, 1100])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_rounded_only_where_that_is_allowed(kind, tokens, medium):
    matrix = KINDS[kind]()
    x, prepared = inputs(tokens, 320), cpu.prepare(matrix)
    expected = x.double() @ matrix.dequantize().double().T
    rounded = cpu.multiply(x, prepared, 70)
    assert rounded.dtype == torch.float32
    assert 1e-4 < relative_error(rounded, expected) < ROUNDING
    with float32_precision("highest"):
        assert relative_error(cpu.multiply(x, prepared, 70), expected) < 1e-6
    assert relative_error(cpu.multiply(x, prepared, 70, exact=True), expected) < 1e-6


@given(matrix=matrices(), tokens=st.sampled_from([12, 64, 65, 71, 256, 257]))
def test_random_layouts(matrix, tokens):
    x, rows = inputs(tokens, matrix.layout.columns).bfloat16(), matrix.layout.rows
    expected, largest = x.float() @ matrix.dequantize().T, (x.abs().float() @ matrix.dequantize().abs().T).max()
    y = cpu.multiply(x, cpu.prepare(matrix), rows)
    limit = 3 * ROUNDING if tokens > cpu.most_tokens() else 0.04
    assert (y - expected).abs().max() <= limit * (largest + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_threads_do_not_disturb_each_other(kind):
    prepared, x = cpu.prepare(KINDS[kind]()), inputs(300, 320).bfloat16()
    together, before = cpu.multiply(x, prepared, 70), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.multiply(x, prepared, 70), together)
    finally:
        torch.set_num_threads(before)
    for some in (slice(0, 65), slice(7, 90), slice(200, 299)):
        assert torch.equal(cpu.multiply(x[some], prepared, 70), together[some])


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind):
    prepared, wide = cpu.prepare(KINDS[kind]()), inputs(1100, 400).bfloat16()
    for x in (wide[:80, 7:327], wide[:, 7:327], wide[::3, :320], wide[:320, :90].T, wide[:1, :320].expand(70, 320)):
        assert torch.equal(cpu.multiply(x, prepared, 70), cpu.multiply(x.contiguous(), prepared, 70))
    many = wide[:320, :320].view(2, 160, 320)
    assert torch.equal(cpu.multiply(many, prepared, 70).flatten(0, 1), cpu.multiply(many.flatten(0, 1), prepared, 70))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_no_numbers_show(kind, value):
    x = inputs(70, 320).bfloat16()
    x[3, 5] = value
    y = cpu.multiply(x, cpu.prepare(KINDS[kind]()), 70)
    assert not y[3].isfinite().any()
    assert y[torch.arange(70) != 3].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_inputs_change_nothing(kind, medium):
    prepared, x = cpu.prepare(KINDS[kind]()), inputs(66, 320)
    y = cpu.multiply(x, prepared, 70)
    for size in (2.0**-90, 2.0**90):
        assert torch.equal(cpu.multiply(size * x, prepared, 70), size * y)
    assert not cpu.multiply(torch.zeros_like(x), prepared, 70).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_every_instruction_set_and_dtype(dtype, medium):
    matrix = KINDS["trellis"]()
    x, prepared = inputs(70, 320).to(dtype), cpu.prepare(matrix)
    for name in cpu.instruction_sets():
        y = cpu.multiply(x, prepared, 70, instruction_set=name)
        assert y.dtype == dtype
        assert relative_error(y, x.double() @ matrix.dequantize().double().T) < ROUNDING


@pytest.mark.parametrize("exact", [False, True])
def test_operator_is_sound(exact):
    arguments = (inputs(70, 320).bfloat16(), cpu.prepare(KINDS["trellis"]()), 70, exact, 0)
    torch.library.opcheck(torch.ops.arbllm.cpu_matmul.default, arguments)


@pytest.mark.parametrize(("precision", "rounded"), [("ieee", False), ("bf16", True)])
def test_newer_settings_of_precision(precision, rounded):
    """In a process of its own, since they cannot be taken back."""
    program = f"""
        import torch
        from arbllm.kernels import cpu
        torch.backends.mkldnn.matmul.fp32_precision = {precision!r}
        assert cpu.rounds_many(torch.float32) is {rounded}
        assert cpu.rounds_many(torch.bfloat16)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
