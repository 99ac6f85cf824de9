"""What products of the CPU kernel are given, and how far they may be off."""

import torch

LARGEST_ERROR = 0.012
"""Of the output, relative, with 8 bits and normally distributed inputs; large matrices come under 0.01."""


def relative_error(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def inputs(tokens, columns, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
