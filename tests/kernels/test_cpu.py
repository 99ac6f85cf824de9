import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import arbllm
from arbllm.errors import ConfigError
from arbllm.format.layout import Segment
from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import cpu, reference
from tests.helpers import in_segments, random_matrix
from tests.kernels.cpu_products import LARGEST_ERROR, inputs, relative_error
from tests.strategies import matrices

pytestmark = pytest.mark.skipif(not cpu.available(), reason="arbllm was installed without its C++ kernels")

KNOWN_SETS = ("avx512", "avx2", "neon", "portable")
SHAPES = ((1, 8), (33, 70), (64, 320), (300, 576), (65, 1536))
FEATURES: dict[str, dict] = {
    "two groups": {},
    "one group": {"groups": 1},
    "four groups": {"groups": 4, "salient": 11, "salient_groups": 4},
    "salient columns": {"salient": 40, "scale_bits": 8, "ordering": "segments"},
    "salient columns without groups": {"groups": 1, "salient": 60, "salient_groups": 1, "ordering": "explicit"},
    "means": {"salient": 20, "row_means": True, "column_scaled": False},
    "means of one group": {"groups": 1, "row_means": True},
    "means of four groups": {"groups": 4, "row_means": True, "scale_bits": 8},
}
TRELLISES: dict[str, tuple[Segment, ...]] = {
    "one sign": (Segment(320, 1, 1, True),),
    "two signs": (Segment(323, 1, 2, True),),
    "three signs": (Segment(77, 1, 3, True),),
    "four signs": (Segment(101, 1, 4, True),),
    "several stretches": (Segment(1030, 1, 2, True),),
    "several stretches of four signs": (Segment(520, 1, 4, True), Segment(513, 1, 4, True)),
    "several segments": tuple(Segment(60 + terms, 1, terms, True) for terms in (3, 1, 4, 2)),
    "narrow segments": (Segment(90, 1, 3, True), *(Segment(width, 1, 5 - width, True) for width in (1, 2, 3, 4))),
    "narrow segments alone": (Segment(1, 1, 1, True), Segment(1, 1, 4, True), Segment(2, 1, 4, True)),
    "trellis and groups": (
        Segment(33, 2, 1),
        Segment(70, 1, 4, True),
        Segment(40, 2, 2),
        Segment(9, 1, 1, True),
        Segment(11, 4, 1),
        Segment(1, 1, 1),
    ),
}
KINDS: dict[str, Callable[[], BinaryMatrix]] = {
    "groups": lambda: random_matrix(70, 320, salient=20),
    "trellis": lambda: in_segments(70, Segment(320, 1, 2, True)),
}
"""Matrices (70, 320) that a kernel multiplies in different ways."""
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(params=KNOWN_SETS)
def instruction_set(request):
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_every_instruction_set_multiplies(instruction_set, features, shape, tokens):
    matrix = random_matrix(*shape, **{**features, "salient": min(features.get("salient", 0), shape[1] // 2)})
    x, prepared = inputs(tokens, shape[1]), cpu.prepare(matrix)
    expected = reference.matmul(x, matrix)
    exact = cpu.multiply(x, prepared, shape[0], exact=True, instruction_set=instruction_set)
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
    quick = cpu.multiply(x, prepared, shape[0], instruction_set=instruction_set)
    largest = (x.abs() @ matrix.dequantize().abs().T).max()
    assert (quick - expected).abs().max() < LARGEST_ERROR * largest
    if shape[0] > 32:
        assert relative_error(quick, expected) < LARGEST_ERROR


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("name", TRELLISES)
def test_a_trellis_is_multiplied(instruction_set, name, rows):
    matrix = in_segments(rows, *TRELLISES[name], ordering="explicit", scale_bits=8, seed=rows)
    prepared, dense = cpu.prepare(matrix), matrix.dequantize()
    most = cpu.most_tokens(cpu.instruction_set_number(instruction_set))
    for tokens in (1, 2, 3, 16, most, most + 1):
        x = inputs(tokens, matrix.layout.columns, seed=tokens)
        expected = x.double() @ dense.double().T
        largest = (x.abs() @ dense.abs().T).max()
        exact = cpu.multiply(x, prepared, rows, exact=True, instruction_set=instruction_set)
        assert (exact - expected).abs().max() <= 1e-6 * largest
        quick = cpu.multiply(x, prepared, rows, instruction_set=instruction_set)
        if tokens > most:
            assert torch.equal(quick, exact)
        if "alone" in name:  # kept as they are
            torch.testing.assert_close(quick, exact, rtol=1e-5, atol=1e-6)
        assert (quick - expected).abs().max() < LARGEST_ERROR * largest
        if rows >= 63:
            assert relative_error(quick, expected) < LARGEST_ERROR


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_dtypes_with_a_trellis(dtype):
    matrix = in_segments(100, Segment(320, 1, 3, True))
    x, prepared = inputs(5, 320).to(dtype), cpu.prepare(matrix)
    for exact in (False, True):
        y = cpu.multiply(x, prepared, 100, exact=exact)
        assert y.dtype == dtype
        allowed = ROUNDING[dtype] + (0 if exact else LARGEST_ERROR)
        assert relative_error(y, reference.matmul(x.double(), matrix)) < allowed


@pytest.mark.parametrize("features", FEATURES)
def test_groups_in_eight_bits_where_bfloat16_is_no_choice(monkeypatch, instruction_set, features):
    """As many tokens as other processors of the same instruction set multiply so."""
    monkeypatch.setattr(cpu, "takes_more", lambda instruction_set: False)
    matrix = random_matrix(130, 576, **FEATURES[features])
    prepared, dense = cpu.prepare(matrix), matrix.dequantize()
    for tokens in (12, 17, cpu.most_tokens(cpu.instruction_set_number(instruction_set))):
        x = inputs(tokens, 576, seed=tokens)
        error = relative_error(cpu.multiply(x, prepared, 130, instruction_set=instruction_set), x @ dense.T)
        assert error < LARGEST_ERROR


@pytest.mark.parametrize("has_instructions", [False, True])
@pytest.mark.parametrize("features", ["two groups", "means of four groups"])
def test_many_tokens_by_unpacked_weights(monkeypatch, features, has_instructions):
    """In bfloat16 where the processor multiplies that, unless an exact product is asked for."""
    monkeypatch.setattr(cpu, "takes_more", lambda instruction_set: False)
    monkeypatch.setattr(cpu.native(), "MULTIPLIES_BFLOAT16", has_instructions)
    matrix = random_matrix(300, 576, **FEATURES[features])
    x, prepared = inputs(cpu.most_tokens() + 1, 576).bfloat16(), cpu.prepare(matrix)
    exact = cpu.multiply(x.float(), prepared, 300, exact=True).bfloat16()
    assert torch.equal(cpu.multiply(x, prepared, 300, exact=True), exact)
    y = cpu.multiply(x, prepared, 300)
    assert y.dtype == torch.bfloat16
    if has_instructions:
        assert relative_error(y, x.double() @ matrix.dequantize().bfloat16().double().T) < 2**-8
    else:
        assert torch.equal(y, exact)


def test_threads_change_nothing_in_a_trellis():
    """Rows of a block follow from those of the block above, which another thread may have."""
    matrix = in_segments(900, Segment(320, 1, 2, True), Segment(61, 1, 4, True))
    x, prepared = inputs(4, 381), cpu.prepare(matrix)
    before = torch.get_num_threads()
    expected = {tokens: cpu.multiply(x[:tokens], prepared, 900) for tokens in (1, 4)}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.prepare(matrix), prepared)
            for tokens, y in expected.items():
                assert torch.equal(cpu.multiply(x[:tokens], prepared, 900), y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_a_trellis_is_prepared_in_the_memory_of_its_stored_signs(terms):
    """Not of the bit more that its levels have."""
    matrix = in_segments(1024, Segment(512, 1, terms, True), Segment(512, 1, terms, True), scale_bits=8)
    prepared = cpu.prepare(matrix)
    signs = 1024 * 1024 * terms // 8
    assert signs < prepared.numel() < 1.02 * signs + 4 * (2 * 1024 + 2 * 1024) + 2048


@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_one_large_input_loses_nothing_to_averages_in_a_trellis(instruction_set, terms):
    """What rounding up adds to averages is known for each table: where the others are 0, it is taken off again."""
    matrix = in_segments(130, Segment(323, 1, terms, True), ordering="explicit", scale_bits=8)
    x = 1000.0 * torch.eye(323)[torch.randperm(323, generator=torch.Generator().manual_seed(0))[:16]]
    prepared = cpu.prepare(matrix)
    quick = torch.cat([cpu.multiply(row[None], prepared, 130, instruction_set=instruction_set) for row in x])
    torch.testing.assert_close(quick, reference.matmul(x, matrix), rtol=1e-4, atol=1e-4)


@given(matrix=matrices(), tokens=st.integers(1, 17) | st.sampled_from([63, 64, 65]))
def test_random_layouts_in_all_instruction_sets(matrix, tokens):
    x, prepared, rows = inputs(tokens, matrix.layout.columns), cpu.prepare(matrix), matrix.layout.rows
    expected = x @ matrix.dequantize().T
    largest = (x.abs() @ matrix.dequantize().abs().T).max() + 1e-6
    rounding = LARGEST_ERROR * (1 if matrix.layout.columns > 32 else 3)  # which evens out over many columns
    for name in cpu.instruction_sets():
        exact = cpu.multiply(x, prepared, rows, exact=True, instruction_set=name)
        assert (exact - expected).abs().max() <= 1e-5 * largest
        quick = cpu.multiply(x, prepared, rows, instruction_set=name)
        assert (quick - expected).abs().max() <= rounding * largest


@pytest.mark.parametrize("tokens", [*range(18), 63, 64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_tokens(tokens, kind):
    matrix, x = KINDS[kind](), inputs(tokens, 320)
    y = cpu.multiply(x, cpu.prepare(matrix), 70)
    assert y.shape == (tokens, 70)
    if tokens:
        assert relative_error(y, reference.matmul(x, matrix)) < LARGEST_ERROR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("least", "tokens"), [(1, 16), (2, 9), (17, 64)])
def test_tokens_do_not_disturb_each_other(instruction_set, kind, least, tokens):
    """Of as many tokens as are multiplied in one way."""
    number = cpu.instruction_set_number(instruction_set)
    if tokens > cpu.most_tokens(number):
        pytest.skip("so many tokens are multiplied exactly")
    if instruction_set == "avx512" and kind == "trellis" and least == 1:
        pytest.skip("one token is multiplied in another way than several")
    if instruction_set == "avx512" and least == 1:
        tokens = 11  # more of columns with groups are multiplied in another way
    prepared, x = cpu.prepare(KINDS[kind]()), inputs(tokens, 320)
    together = cpu.multiply(x, prepared, 70, instruction_set=instruction_set)
    for token, row in zip(x, together, strict=True):
        again = cpu.multiply(token.expand(least, -1), prepared, 70, instruction_set=instruction_set)
        assert torch.equal(again, row.expand(least, -1))


@pytest.mark.parametrize("tokens", [4, 17])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads, tokens):
    matrix = random_matrix(900, 320, salient=20)
    x, prepared = inputs(tokens, 320), cpu.prepare(matrix)
    before, expected = torch.get_num_threads(), cpu.multiply(x, prepared, 900)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.prepare(matrix), prepared)
        assert torch.equal(cpu.multiply(x, prepared, 900), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("exact", [False, True])
def test_dtypes(dtype, exact):
    matrix = random_matrix(100, 320, salient=20)
    x, prepared = inputs(5, 320).to(dtype), cpu.prepare(matrix)
    y = cpu.multiply(x, prepared, 100, exact=exact)
    assert y.dtype == dtype
    assert relative_error(y, reference.matmul(x.double(), matrix)) < ROUNDING[dtype] + (0 if exact else LARGEST_ERROR)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 4)])
def test_any_leading_dimensions(shape):
    matrix = random_matrix(20, 30, salient=4)
    x = torch.randn(*shape, 30)
    y = cpu.multiply(x, cpu.prepare(matrix), 20, exact=True)
    assert y.shape == (*shape, 20)
    torch.testing.assert_close(y, x @ matrix.dequantize().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [5, 70])
def test_any_strides(dtype, exact, tokens):
    matrix = random_matrix(70, 96, salient=10)
    prepared = cpu.prepare(matrix)
    wide = inputs(tokens, 200).to(dtype)
    for x in (wide[:, 7:103], wide[::2, :96], inputs(96, tokens).to(dtype).T, wide[:1, :96].expand(tokens, 96)):
        expected = cpu.multiply(x.contiguous(), prepared, 70, exact=exact)
        torch.testing.assert_close(cpu.multiply(x, prepared, 70, exact=exact), expected)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_zero_of_one_large_and_of_tiny_numbers(instruction_set, kind, tokens):
    matrix = KINDS[kind]()
    prepared = cpu.prepare(matrix)

    def product(x):
        return cpu.multiply(x.expand(tokens, -1), prepared, 70, instruction_set=instruction_set)

    assert not product(torch.zeros(320)).any()
    x = torch.zeros(320)
    x[17] = 1e6
    assert relative_error(product(x), reference.matmul(x, matrix).expand(tokens, -1)) < 2e-3
    small = inputs(1, 320)
    for size in (2.0**-66, 2.0**-93):
        assert relative_error(product(size * small) / size, product(small)) < 1e-3
    for size in (1e-31, 1e-38, 1e-44):
        assert product(size * small).abs().max() < 100 * size


def test_real_inputs_of_very_different_sizes_keep_their_precision():
    matrix = random_matrix(512, 1024, salient=100, block_size=512)
    sizes = torch.exp(1.5 * inputs(1, 1024, seed=1))
    x = inputs(4, 1024) * sizes
    error = relative_error(cpu.multiply(x, cpu.prepare(matrix), 512), reference.matmul(x, matrix))
    assert error < 2 * LARGEST_ERROR


def test_unknown_instruction_set_is_named():
    matrix = random_matrix(4, 16)
    with pytest.raises(ConfigError, match="'sse' is not available; choose one of"):
        cpu.multiply(torch.randn(1, 16), cpu.prepare(matrix), 4, instruction_set="sse")


def test_a_tensor_that_was_not_prepared_is_refused():
    with pytest.raises(ValueError, match="not a prepared matrix"):
        cpu.multiply(torch.randn(1, 16), torch.zeros(4096, dtype=torch.uint8), 4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [3, 20])
def test_operator_is_sound(tokens, exact):
    prepared = cpu.prepare(random_matrix(33, 70, salient=9))
    arguments = (torch.randn(tokens, 70), prepared, 33, exact, 0)
    torch.library.opcheck(torch.ops.arbllm.cpu_matmul.default, arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["groups", "trellis"])
def test_inputs_that_are_no_numbers_show(instruction_set, kind, value):
    matrix = random_matrix(70, 320, salient=20) if kind == "groups" else in_segments(70, Segment(700, 1, 2, True))
    prepared = cpu.prepare(matrix)
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, matrix.layout.columns)
        x[0, 5] = value
        y = cpu.multiply(x, prepared, 70, instruction_set=instruction_set)
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()


def test_the_stub_names_what_the_extension_has():
    native = cpu.native()
    stub = Path(arbllm.__file__).with_name("_native.pyi")
    declared = re.findall(r"^(?:def |class )?([A-Za-z_0-9]+)(?:\(|:)", stub.read_text(), re.MULTILINE)
    assert {name for name in dir(native) if not name.startswith("_")} == set(declared)
