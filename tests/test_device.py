from contextlib import suppress

import pytest
import torch

from arbllm.device import check_disk_space, choose_device, evaluation_dtype, float32_precision, peak_memory_bytes
from arbllm.errors import ArbllmError, ConfigError


def test_names_and_default():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["", "nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ConfigError, match="device"):
        choose_device(name)


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [("auto", "cpu", "float32"), ("auto", "cuda", "auto"), ("bfloat16", "cpu", "bfloat16")],
)
def test_evaluation_is_in_float32_on_the_cpu_unless_told_otherwise(dtype, device, expected):
    assert evaluation_dtype(dtype, torch.device(device)) == expected


def test_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with float32_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with suppress(RuntimeError), float32_precision("medium"):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_peak_memory_is_plausible():
    assert 10 * 2**20 < peak_memory_bytes() < 2**40


def test_room_on_the_disk(tmp_path):
    check_disk_space(1000, tmp_path)
    with pytest.raises(ArbllmError, match="can take 9,000,000,000,000,000,000 bytes"):
        check_disk_space(9 * 10**18, tmp_path)
