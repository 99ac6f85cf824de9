import pytest

from arbllm.errors import ConfigError
from arbllm.sizes import size_in_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1.8GB", 1_800_000_000), ("95MB", 95_000_000), (" 60 kb ", 60_000), ("2T", 2 * 10**12), ("700", 700), (700, 700)],
)
def test_sizes_are_numbers_with_or_without_a_unit(size, expected):
    assert size_in_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "1.8 gallons", "-5MB", "1.2.3MB", "1,8GB", -1])
def test_what_is_no_size_is_refused_with_an_example(size):
    with pytest.raises(ConfigError, match=r"is not understood; write it as in 1\.8GB"):
        size_in_bytes(size)
