import pytest

from arbllm.format.accounting import total_size
from arbllm.format.published import (
    GIGABYTES,
    LLAMA_7B,
    LLAMA_13B,
    METHODS,
    half_precision_bytes,
    published_bits,
    published_bytes,
    published_layout,
)

SHAPES = (LLAMA_7B, LLAMA_13B)


@pytest.mark.parametrize(("method", "cgb"), GIGABYTES)
@pytest.mark.parametrize("csr", [False, True])
def test_the_memory_table_of_the_paper(method, cgb, csr):
    found = [published_bytes(method, shape, cgb=cgb, csr=csr) / 1e9 for shape in SHAPES]
    assert tuple(round(size, 2) for size in found) == GIGABYTES[method, cgb][csr]


def test_its_gigabytes_are_powers_of_ten():
    assert round(half_precision_bytes(LLAMA_7B) / 1e9, 2) == 13.48
    assert round(half_precision_bytes(LLAMA_13B) / 1e9, 2) == 26.03
    assert round(published_bytes("arb-rc", LLAMA_7B, cgb=True) / 2**30, 2) == 2.63


def test_llama_has_as_many_weights_as_are_known():
    assert half_precision_bytes(LLAMA_7B) / 2 == 6_738_415_616
    assert half_precision_bytes(LLAMA_13B) / 2 == 13_015_864_320


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cgb", [False, True])
def test_csr_replaces_n_m_bits_by_n_c(method, cgb):
    saved = published_bits(method, 32, 1000, cgb=cgb) - published_bits(method, 32, 1000, cgb=cgb, csr=True)
    assert saved == pytest.approx(32 * (1000 - 90))


def test_one_small_linear_by_hand():
    """Two blocks of 128, 25 salient columns, 10 rows."""
    options = {"rows": 10, "columns": 250, "salient_share": 0.1}
    signs, bitmaps = 2 * 10 * 25 + 10 * 225, 10 * 250 + 250
    regular = 2 * (2 * 10 + 225) * 16
    assert published_bits("arb-rc", **options, cgb=True) == signs + bitmaps + regular + 2 * (4 * 10 + 50) * 16
    assert published_bits("billm", **options, cgb=False) == signs + bitmaps + 4 * 20 * 16 + 3 * 20 * 16


@pytest.mark.parametrize(("method", "cgb"), GIGABYTES)
@pytest.mark.parametrize("shape", SHAPES, ids=["7B", "13B"])
def test_what_is_counted_is_what_is_stored(method, cgb, shape):
    """But for the group numbers of salient columns that have one group only, which the paper counts too."""
    size = total_size(shape.blocks * [published_layout(method, n, m, cgb=cgb) for n, m in shape.linears])
    needless = 0 if cgb else 0.09 * shape.linear_weights / 8
    assert size.weights == shape.linear_weights
    assert size.nominal_bits == pytest.approx(1.09, abs=0.001)
    assert size.nbytes + shape.dense_bytes == pytest.approx(
        published_bytes(method, shape, cgb=cgb) - needless, rel=0.001
    )


def test_a_layout_with_a_short_block_is_sound():
    layout = published_layout("arb-rc", 10, 150, cgb=True, salient_share=0.01)
    layout.check()
    assert layout.salient == 2
