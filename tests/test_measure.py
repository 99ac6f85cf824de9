import sys
import time

import pytest
import torch

from arbllm.measure import measure

MEGABYTE = 2**20


def test_seconds():
    with measure() as measured:
        time.sleep(0.05)
    assert 0.05 <= measured.seconds < 5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset its peak")
def test_the_peak_is_that_of_the_block_alone():
    with measure() as large:
        torch.ones(64 * MEGABYTE, dtype=torch.uint8).sum()
    with measure() as small:
        pass
    assert large.peak_memory_bytes - small.peak_memory_bytes > 48 * MEGABYTE


def test_the_peak_is_kept_when_the_block_fails():
    with pytest.raises(KeyError), measure() as measured:
        raise KeyError
    assert measured.peak_memory_bytes > 10 * MEGABYTE
