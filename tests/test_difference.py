import pytest
import torch

from arbllm.difference import output_error, weight_error


def test_errors_are_relative():
    torch.manual_seed(0)
    weight, x = torch.randn(5, 7), torch.randn(7, 40)
    approximation = weight + 0.1 * torch.randn(5, 7)
    squares = ((weight - approximation) @ x).square().sum() / (weight @ x).square().sum()
    assert output_error(weight, approximation, x @ x.T) == pytest.approx(float(squares), rel=1e-4)
    assert weight_error(weight, approximation) == pytest.approx(
        float((weight - approximation).square().sum() / weight.square().sum())
    )


def test_a_weight_of_zeros_has_no_error():
    zeros = torch.zeros(3, 4)
    assert (output_error(zeros, zeros, torch.eye(4)), weight_error(zeros, zeros)) == (0.0, 0.0)
