"""The coefficients of `arbllm.binarize.code`: a normal distribution represented with the least squared error.

Lloyd's method: signs are chosen by Viterbi's algorithm for the levels so far, then coefficients by least squares for
these signs, in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from torch import Tensor

from arbllm.binarize import code
from arbllm.binarize.sweep import Pass
from arbllm.binarize.viterbi import SIGN, viterbi_sweep


def main() -> None:
    """Print coefficients of all kinds, and their errors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-products", action="store_true", help="levels that are sums of signs alone")
    options = parser.parse_args()
    if options.no_products:
        code.PRODUCTS.update({terms: {} for terms in code.PRODUCTS})
        code.level_values.cache_clear()
    sample = torch.randn(1, options.samples, generator=torch.Generator().manual_seed(0))
    for terms in code.COEFFICIENTS:
        products = list(code.PRODUCTS[terms])
        for round in range(options.rounds + 1):
            numbers, error = represent(sample, terms)
            if not round:
                print(f"{terms} signs: error {error:.5f} as it is", end=", ")
            fit(terms, numbers, sample, products)
        print(f"{error:.5f} after {options.rounds} rounds, coefficients", rounded(code.COEFFICIENTS[terms]))
        print("   products", dict(zip(products, rounded(code.PRODUCTS[terms].values()), strict=True)))


def represent(sample: Tensor, terms: int) -> tuple[Tensor, float]:
    """Numbers of the levels chosen for a sample (1, n), and the mean squared error."""
    one = torch.ones(1)
    choices, values = viterbi_sweep(torch.ones_like(sample[0]), one, terms, Pass(sample, None, one, one[None]))
    return (choices & (SIGN - 1)).int(), float((values - sample).square().mean())


def fit(terms: int, numbers: Tensor, sample: Tensor, products: list[tuple[int, int, int]]) -> None:
    """Put the coefficients with the least error for these levels in the place of those that the module has."""
    signs = [2.0 * (numbers[0] >> place & 1) - 1 for place in range(terms, -1, -1)]
    basis = signs + [torch.stack([signs[place] for place in places]).prod(0) for places in products]
    found = torch.linalg.lstsq(torch.stack(basis, 1), sample.T).solution[:, 0].tolist()
    code.COEFFICIENTS[terms] = tuple(found[: terms + 1])
    code.PRODUCTS[terms] = dict(zip(products, found[terms + 1 :], strict=True))
    code.level_values.cache_clear()


def rounded(values: Iterable[float]) -> list[float]:
    """To four digits after the point."""
    return [round(value, 4) for value in values]


if __name__ == "__main__":
    main()
