import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbllm import budget as module
from arbllm.budget import (
    COLUMNS_AT_A_TIME,
    ERROR_PER_BIT,
    KINDS,
    OUTLIER,
    TRELLIS_KINDS,
    Demand,
    allocate,
    joint_layout,
)
from arbllm.config import FEWEST_BITS, MOST_BITS
from arbllm.errors import ConfigError
from arbllm.format.accounting import matrix_size, total_size
from arbllm.format.layout import Layout, Segment

SIZES = st.integers(1, 80)
WIDTHS = st.sampled_from([1, 7, 8, 12, 33, 64, 100, 128, 192, 200])
BLOCKS = st.sampled_from([8, 13, 64, 100, 256, 512])
BITS = st.floats(FEWEST_BITS, MOST_BITS)
TRELLIS = pytest.mark.parametrize("trellis", [False, True], ids=["groups", "trellis"])
MATRICES = [(576, 576), (192, 576), (576, 1536), (2048, 2048), (4096, 11008)]


def bits_of(layout: Layout) -> float:
    return matrix_size(layout).true_bits


def kinds_of(layout: Layout) -> dict[int, int]:
    """Columns by bits of a weight, before scales."""
    found: dict[int, int] = {}
    for segment in layout.segments:
        found[segment.bits] = found.get(segment.bits, 0) + segment.width
    return found


def asked(rows: int, columns: int, bits: float, scale_block: int, trellis: bool = True) -> Layout | None:
    """The layout, or None where the bits do not suffice."""
    try:
        return joint_layout(rows, columns, bits, scale_block, trellis=trellis)
    except ConfigError:
        return None


@pytest.mark.parametrize("kinds", [KINDS, TRELLIS_KINDS])
def test_kinds_ascend_by_one_bit(kinds):
    assert [Segment(8, *kind).bits for kind in kinds] == [1, 2, 3, 4]


@given(rows=SIZES, columns=WIDTHS, bits=BITS, scale_block=BLOCKS, trellis=st.booleans())
def test_a_layout_is_sound_and_keeps_to_its_bits(rows, columns, bits, scale_block, trellis):
    if (layout := asked(rows, columns, bits, scale_block, trellis)) is None:
        return
    layout.check()
    assert (layout.rows, layout.columns) == (rows, columns)
    assert bits_of(layout) <= bits
    kinds = [(TRELLIS_KINDS if trellis else KINDS).index(segment[1:]) for segment in layout.segments]
    assert kinds == sorted(kinds)
    assert kinds[-1] - kinds[0] <= 1
    # Whole bytes: only the last segment of a matrix may end elsewhere, and what is left of the cheaper kind.
    better = sum(segment.width for segment, kind in zip(layout.segments, kinds, strict=True) if kind > kinds[0])
    assert better % COLUMNS_AT_A_TIME == 0


@settings(max_examples=40)
@given(rows=SIZES, columns=WIDTHS, bits=BITS, scale_block=BLOCKS, trellis=st.booleans())
def test_of_all_mixtures_it_is_the_best_that_the_bits_pay_for(rows, columns, bits, scale_block, trellis):
    payable = [
        layout
        for kind in range(len(KINDS))
        for better in range(0, columns if kind + 1 < len(KINDS) else 1, COLUMNS_AT_A_TIME)
        if bits_of(layout := module._layout(rows, columns, scale_block, 0, trellis, kind, better)) <= bits
    ]
    assert asked(rows, columns, bits, scale_block, trellis) == (payable[-1] if payable else None)


@given(rows=SIZES, columns=WIDTHS, scale_block=BLOCKS, pair=st.tuples(BITS, BITS), trellis=st.booleans())
def test_more_bits_never_buy_less(rows, columns, scale_block, pair, trellis):
    fewer, more = (asked(rows, columns, bits, scale_block, trellis) for bits in sorted(pair))
    if fewer is None:
        return
    assert more is not None
    assert bits_of(more) >= bits_of(fewer)


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("bits", [1.1, 1.5, 1.9, 2.25, 2.3, 2.8, 3.4, 4.0])
@TRELLIS
def test_real_matrices_come_near_to_what_is_asked(trellis, shape, bits):
    rows, columns = shape
    kinds = TRELLIS_KINDS if trellis else KINDS
    layout = joint_layout(rows, columns, bits, 512, trellis=trellis)
    # A column step: one bit more and, at its dearest, the row scales of a segment that begins with it.
    last = kinds.index(layout.segments[-1][1:])
    dearest = Segment(COLUMNS_AT_A_TIME, *kinds[min(last + 1, len(kinds) - 1)])
    step = COLUMNS_AT_A_TIME / columns + 1.1 * 8 * dearest.slots / columns
    assert bits - step < bits_of(layout) <= bits


def test_the_default_budget_on_a_real_matrix():
    layout = joint_layout(576, 1536, 2.25, 512)
    assert layout == joint_layout(576, 1536, 2.25, 512, trellis=True)
    assert kinds_of(layout).keys() == {2, 3}
    assert all(segment.trellis for segment in layout.segments)
    assert layout.scale_bits == 8
    assert layout.column_scaled
    assert not layout.row_means
    assert layout.ordering == "segments"
    assert joint_layout(64, 64, 1.51, 512).ordering == "natural"


@pytest.mark.parametrize(("rows", "columns"), MATRICES)
@pytest.mark.parametrize("bits", [1.3, 2.25, 2.9])
def test_a_trellis_leaves_more_of_the_bits_to_signs(rows, columns, bits):
    """It has one scale for a row and one for a column."""
    signs = [
        sum(segment.bits * segment.width for segment in joint_layout(rows, columns, bits, 512, 0, trellis).segments)
        for trellis in (False, True)
    ]
    assert signs[1] > signs[0]


@TRELLIS
def test_segments_are_about_as_wide_as_asked(trellis):
    for scale_block in (64, 100, 512):
        layout = joint_layout(4096, 4096, 2.5, scale_block, trellis=trellis)
        assert all(0.7 * scale_block <= segment.width <= 1.5 * scale_block for segment in layout.segments)


@TRELLIS
def test_too_few_bits_name_the_least(trellis):
    with pytest.raises(
        ConfigError, match=r"a 16 x 24 matrix takes at least (\d\.\d{3}) bits .* more than 1.2"
    ) as caught:
        joint_layout(16, 24, 1.2, 512, trellis=trellis)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    assert bits_of(joint_layout(16, 24, least + 0.001, 512, trellis=trellis)) <= least + 0.001


# Many matrices.


def demands(worths: dict[str, float], rows: int = 576, columns: int = 576) -> dict[str, Demand]:
    """Linears of one size; their worths are per weight."""
    return {name: Demand(rows, columns, worth * rows * columns) for name, worth in worths.items()}


def spent(asking: dict[str, Demand], bits: dict[str, float], scale_block: int, trellis: bool) -> float:
    layouts = (joint_layout(d.rows, d.columns, bits[name], scale_block, trellis=trellis) for name, d in asking.items())
    return total_size(layouts).true_bits


@settings(max_examples=15)
@given(
    worths=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=6),
    bits=st.floats(1.2, 3.9),
    rows=st.sampled_from([64, 576]),
    trellis=st.booleans(),
)
def test_a_divided_budget_is_kept_and_spent(worths, bits, rows, trellis):
    asking = {str(i): Demand(rows, 96 * (1 + i % 3), worth) for i, worth in enumerate(worths)}
    try:
        shares = allocate(asking, bits, 64, trellis)
    except ConfigError:
        return
    assert shares.keys() == asking.keys()
    assert all(FEWEST_BITS <= share <= MOST_BITS for share in shares.values())
    assert spent(asking, shares, 64, trellis) <= bits
    more = {name: min(MOST_BITS, share + 0.02) for name, share in shares.items()}
    assert spent(asking, more, 64, trellis) > bits or max(more.values()) == MOST_BITS


def test_equal_worths_get_equal_bits():
    shares = allocate(demands(dict.fromkeys("abc", 5.0)), 2.25, 512)
    assert max(shares.values()) == min(shares.values())
    assert shares["a"] >= 2.25


def test_a_worth_that_a_bit_makes_up_for_gets_a_bit_more():
    shares = allocate(demands({"cheap": 1.0, "dear": ERROR_PER_BIT}), 2.25, 512)
    assert shares["dear"] - shares["cheap"] == pytest.approx(1)
    shares = allocate(demands({"cheap": 1.0, "dear": ERROR_PER_BIT**9}), 2.25, 512)
    assert shares["cheap"] == pytest.approx(FEWEST_BITS)
    shares = allocate({"silent": Demand(576, 576, 0.0), "dear": Demand(576, 576, 1.0)}, 2.25, 512)
    assert shares["silent"] == FEWEST_BITS


def test_no_other_division_is_better():
    """By the model of the error that it goes by, moving bits between two linears of any sizes raises the total."""
    asking = {"a": Demand(192, 576, 10.0), "b": Demand(576, 576, 40.0), "c": Demand(576, 1536, 200.0)}
    shares = allocate(asking, 2.4, 512)
    sizes = {name: d.rows * d.columns for name, d in asking.items()}

    def total(bits: dict[str, float]) -> float:
        return sum(d.worth * ERROR_PER_BIT ** -bits[name] for name, d in asking.items())

    for giver in asking:
        for taker in asking:
            moved = dict(shares)
            moved[giver] -= 1e3 / sizes[giver]
            moved[taker] += 1e3 / sizes[taker]
            assert total(moved) >= total(shares)


def test_bits_below_the_least_are_refused():
    with pytest.raises(ConfigError, match=r"at least 1\.\d+ bits a weight with scales, more than 1.12"):
        allocate(demands({"a": 1.0}, 64, 64), 1.12, 512)


@pytest.mark.parametrize(("rows", "columns"), MATRICES)
@pytest.mark.parametrize("bits", [1.3, 2.25, 4.0])
@TRELLIS
def test_outliers_come_last_and_are_paid_for(trellis, rows, columns, bits):
    layout = joint_layout(rows, columns, bits, 512, outliers=3, trellis=trellis)
    assert layout.segments[-3:] == (OUTLIER,) * 3
    assert sum(segment.width for segment in layout.segments) == columns
    assert bits_of(layout) <= bits


@TRELLIS
def test_outliers_are_left_out_where_the_bits_do_not_suffice(trellis):
    least = next(bits / 1000 for bits in range(1000, 4000) if asked(192, 576, bits / 1000, 512, trellis))
    layout = joint_layout(192, 576, least, 512, outliers=5, trellis=trellis)
    assert OUTLIER not in layout.segments
    assert layout == joint_layout(192, 576, least, 512, trellis=trellis)
