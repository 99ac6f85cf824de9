import pytest
import torch

from arbllm.device import choose_device, evaluation_dtype
from arbllm.errors import ConfigError


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
