"""What is mapped from a file leaves memory once it is prepared, and nothing else does."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from arbllm.format.matrix import BinaryMatrix
from arbllm.kernels import cpu
from arbllm.nn import BinaryLinear
from tests.helpers import random_matrix

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are a file's"),
    pytest.mark.skipif(not cpu.available(), reason="arbllm was installed without its C++ kernels"),
]
PAGE = 4096


@pytest.fixture
def matrix():
    return random_matrix(512, 320, salient=20)


@pytest.fixture
def mapped(matrix, tmp_path):
    """The same matrix, its tensors mapped from a file."""
    save_file(matrix.tensors(), tmp_path / "matrix.safetensors")
    return BinaryMatrix.from_tensors(matrix.layout, load_file(tmp_path / "matrix.safetensors"))


def test_tensors_of_a_file_are_given_back_and_read_again(matrix, mapped):
    weight = mapped.dequantize()
    assert cpu.give_back(mapped) >= mapped.signs.nbytes - PAGE
    assert cpu.give_back(mapped) == 0
    assert torch.equal(mapped.dequantize(), weight)
    assert torch.equal(matrix.dequantize(), weight)
    assert cpu.give_back(mapped) > 0


def test_a_tensor_that_was_written_to_stays(matrix, mapped):
    mapped.signs.data.bitwise_not_()
    assert cpu.give_back(mapped) < mapped.nbytes - mapped.signs.nbytes + 2 * PAGE
    assert torch.equal(mapped.signs, ~matrix.signs)


def test_tensors_of_no_file_stay(matrix):
    before = matrix.map(torch.clone)
    assert cpu.give_back(matrix) == 0
    assert all(torch.equal(matrix.tensors()[name], tensor) for name, tensor in before.tensors().items())


def test_a_layer_gives_back_what_it_prepared(matrix, mapped):
    layer, x = BinaryLinear.from_matrix(mapped), torch.randn(2, 320)
    y = layer(x)
    assert cpu.give_back(mapped) == 0
    assert torch.equal(y, BinaryLinear.from_matrix(matrix)(x))
    saved = layer.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in matrix.tensors().items())
    assert torch.equal(layer(x), y)
