import pytest

from arbllm.format.published import (
    LLAMA_7B,
    LLAMA_13B,
    METHODS,
    half_precision_bytes,
    published_bits,
    published_bytes,
)

# The memory table of the paper in GB: without CGB and with it, each raw and with what it calls CSR.
WITHOUT_CGB, WITH_CGB, CSR = {"cgb": False}, {"cgb": True}, {"csr": True}
ROWS = [
    ("billm", WITHOUT_CGB, 2.93, 5.36),
    ("billm", WITHOUT_CGB | CSR, 2.19, 3.92),
    ("arb-x", WITHOUT_CGB, 2.93, 5.36),
    ("arb-x", WITHOUT_CGB | CSR, 2.19, 3.92),
    ("arb-x", WITH_CGB, 3.23, 5.95),
    ("arb-x", WITH_CGB | CSR, 2.49, 4.51),
    ("arb-rc", WITHOUT_CGB, 2.63, 4.77),
    ("arb-rc", WITHOUT_CGB | CSR, 1.89, 3.33),
    ("arb-rc", WITH_CGB, 2.83, 5.17),
    ("arb-rc", WITH_CGB | CSR, 2.09, 3.73),
]


@pytest.mark.parametrize(("method", "options", "small", "large"), ROWS)
def test_the_memory_table_of_the_paper(method, options, small, large):
    assert [round(published_bytes(method, shape, **options) / 1e9, 2) for shape in (LLAMA_7B, LLAMA_13B)] == [
        small,
        large,
    ]


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
