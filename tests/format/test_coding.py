from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbllm.errors import CheckpointError, ConfigError
from arbllm.format.bitplanes import pack
from arbllm.format.coding import check_coding, coded_planes, decode, encode, is_possible_size
from tests.helpers import random_matrix
from tests.strategies import matrices

CODED = pytest.mark.parametrize("coding", ["csr", "entropy"])


def plane(rows, width, share, seed=0):
    """Bits that are ones with this probability, one for all or one a row, packed."""
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.rand(rows, width, generator=generator) < torch.as_tensor(share).reshape(-1, 1))


def bits_per_weight(coded, rows, width):
    return 8 * len(coded) / (rows * width)


def entropy(share):
    return float(-(share * np.log2(share) + (1 - share) * np.log2(1 - share)))


@CODED
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(coding, rows, width, share, seed):
    original = plane(rows, width, share, seed)
    coded = encode(original, width, coding)
    assert coded.dtype == torch.uint8
    assert coded.dim() == 1
    assert is_possible_size(len(coded), rows, width, coding)
    assert torch.equal(decode(coded, rows, width, coding), original)


@CODED
@settings(max_examples=25)
@given(matrix=matrices())
def test_planes_of_any_matrix(coding, matrix):
    for name, width in coded_planes(matrix.layout, coding).items():
        original = matrix.tensors()[name]
        assert torch.equal(decode(encode(original, width, coding), len(original), width, coding), original)


def test_which_planes_are_coded():
    layout = random_matrix(4, 24, groups=2, salient_groups=4, salient=5).layout
    assert coded_planes(layout, "csr") == {"group_bitmap": 24, "group_bitmap_high": 5}
    assert coded_planes(layout, "raw") == {}
    assert coded_planes(random_matrix(4, 24, groups=1).layout, "entropy") == {}


def test_csr_byte_by_byte():
    bits = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    expected = [1, 0, 0, 2, 0, 2, 0, 3, 0, 1, 0, 3, 0, 0, 0]
    assert encode(pack(bits), 5, "csr").tolist() == expected
    assert encode(pack(~bits), 5, "csr").tolist() == [0, *expected[1:]]


@pytest.mark.parametrize(("rows", "width", "share"), [(64, 512, 0.3), (64, 512, 0.8), (1, 70_000, 0.01)])
def test_csr_takes_an_index_for_each_of_the_rarer_symbol(rows, width, share):
    bits = plane(rows, width, share)
    ones = int(np.unpackbits(bits.numpy()).sum())
    listed = min(ones, rows * width - ones)
    assert len(encode(bits, width, "csr")) == 1 + 2 * (rows + 1) + (4 if width > 65_536 else 2) * listed


@pytest.mark.parametrize("share", [0.02, 0.107, 0.3, 0.35, 0.5, 0.9])
def test_entropy_reaches_the_bound(share):
    rows, width = 512, 1024
    bits = plane(rows, width, share)
    ones = np.unpackbits(bits.numpy()).mean()
    assert bits_per_weight(encode(bits, width, "entropy"), rows, width) < entropy(ones) + 0.002


def test_entropy_gains_where_rows_differ():
    rows, width = 256, 1024
    shares = torch.linspace(0.1, 0.5, rows)
    coded = encode(plane(rows, width, shares), width, "entropy")
    apart = np.mean([entropy(share) for share in shares.numpy()])
    assert bits_per_weight(coded, rows, width) < apart + 0.01 < entropy(0.3) - 0.03


def test_the_coded_form_stays_as_released():
    """Checkpoints hold it: whatever a later constriction does, these bytes must read the same."""
    original = pack((torch.arange(60) ** 2 % 7 == 2).view(3, 20))
    expected = bytes.fromhex("7894f855cd830f5500a40f8e4a2c6042ce")
    assert bytes(encode(original, 20, "entropy").tolist()) == expected


@CODED
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 70),
    place=st.integers(0, 10_000),
    change=st.integers(1, 255),
    cut=st.booleans(),
)
def test_damage_is_an_error_or_does_not_matter(coding, rows, width, place, change, cut):
    original = plane(rows, width, 0.3)
    coded = encode(original, width, coding)
    place %= len(coded)
    if cut:
        coded = coded[:place]
    else:
        coded[place] ^= change
    try:
        decoded = decode(coded, rows, width, coding, "proj.group_bitmap")
    except CheckpointError as error:
        assert str(error).startswith("proj.group_bitmap: no bitmap as")  # noqa: PT017
    else:
        assert decoded.shape == original.shape
        assert coding == "csr" or torch.equal(decoded, original)


@CODED
@given(noise=st.binary(max_size=200), rows=st.integers(1, 12), width=st.integers(1, 40))
def test_noise_never_crashes(coding, noise, rows, width):
    coded = torch.tensor(list(noise), dtype=torch.uint8)
    with suppress(CheckpointError):
        decode(coded, rows, width, coding)


@pytest.mark.parametrize(
    "coded",
    [
        [2, 0, 0, 2, 0, 1, 0, 3, 0],  # neither 0 nor 1 is listed
        [1, 1, 0, 2, 0, 1, 0, 3, 0],  # the first row begins later
        [1, 0, 0, 1, 0, 1, 0, 3, 0],  # the last row ends sooner
        [1, 0, 0, 2, 0, 3, 0, 1, 0],  # columns fall
        [1, 0, 0, 2, 0, 1, 0, 1, 0],  # a column twice
        [1, 0, 0, 2, 0, 1, 0, 5, 0],  # a column beyond the row
        [1, 0, 0, 0, 0, 1, 0],  # fewer columns than the row pointers say
    ],
)
def test_lists_that_are_none_are_refused(coded):
    assert decode(torch.tensor([1, 0, 0, 2, 0, 1, 0, 3, 0], dtype=torch.uint8), 1, 5, "csr").tolist() == [[0b01010]]
    with pytest.raises(CheckpointError, match="quantize the model again"):
        decode(torch.tensor(coded, dtype=torch.uint8), 1, 5, "csr")


def test_impossible_sizes():
    assert not is_possible_size(8, 3, 20, "entropy")
    assert not is_possible_size(14, 3, 20, "entropy")
    assert not is_possible_size(8, 3, 20, "csr")
    assert not is_possible_size(10, 3, 20, "csr")
    assert not is_possible_size(9 + 2 * 31, 3, 20, "csr")


def test_an_unknown_coding_is_refused():
    with pytest.raises(ConfigError, match="raw, csr, entropy"):
        check_coding("zip")
