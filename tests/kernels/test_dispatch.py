import pytest
import torch

from arbllm.errors import ConfigError
from arbllm.kernels.dispatch import KERNELS, get_kernel
from tests.helpers import random_matrix


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_multiplies(name):
    matrix, x = random_matrix(33, 70, salient=9, row_means=True), torch.randn(2, 3, 70)
    torch.testing.assert_close(get_kernel(name)(x, matrix), x @ matrix.dequantize().T)


def test_unknown_kernel_is_named_with_those_that_exist():
    with pytest.raises(ConfigError, match="'fast' is unknown; choose one of reference"):
        get_kernel("fast")
