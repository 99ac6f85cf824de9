"""Column deviation: how much of the spread of |W| lies between columns, and what each method leaves of it.

Row scales alone describe no difference between columns; this is why ARB-RC has column scales (the paper's Figure 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arbllm.binarize.methods import METHODS
from arbllm.config import BinarizationConfig
from arbllm.difference import output_error, weight_error
from arbllm.errors import ConfigError
from arbllm.model.capture import capture_inputs, gather_hessians, propagate, resident
from arbllm.model.quantize import check_windows
from arbllm.model.walk import DecoderBlock, check_weights, find_blocks
from arbllm.solver import quantize_matrix

POWER_STEPS = 30
DEPTHS = ("first third", "middle third", "last third")


@dataclass(frozen=True)
class Shares:
    """Shares of the variance of |W| over all its entries.

    Attributes:
        columns: between the means of columns.
        rows: between the means of rows.
        jointly: explained by the best product of a row factor and a column factor, as row and column scales are.
        columns_by_chance: what `columns` would be, were all entries drawn from one distribution: about 1 / n.
        rows_by_chance: likewise, about 1 / m.
    """

    columns: float
    rows: float
    jointly: float
    columns_by_chance: float
    rows_by_chance: float


@dataclass(frozen=True)
class LinearShares:
    """One linear: its full name, its decoder block, its kind (the last part of the name), and its shares."""

    name: str
    block: int
    kind: str
    shares: Shares


@dataclass(frozen=True)
class Remainder:
    """What a method makes of one linear.

    Attributes:
        method: by name.
        true_bits: stored bits a weight.
        weight_error: ||W - W_hat||_F^2 / ||W||_F^2.
        output_error: tr(D H D^T) / tr(W H W^T), D = W - W_hat.
        columns: share of the variance of |W - W_hat| between columns.
        weight: W_hat, float32 (n, m).
    """

    method: str
    true_bits: float
    weight_error: float
    output_error: float
    columns: float
    weight: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: value for key, value in vars(self).items() if key != "weight"}


def variance_shares(weight: Tensor) -> Shares:
    """Shares of the variance of |W|, for W (n, m), any floating dtype.

    With A = |W| and its mean a: columns n sum_j (mean_i A_ij - a)^2, rows m sum_i (mean_j A_ij - a)^2, jointly the
    total less ||A - s u v^T||^2 with the first singular triple, each over the total, sum (A - a)^2.
    """
    values = weight.detach().double().abs()
    rows, columns = values.shape
    centre = values.mean()
    total = float((values - centre).square().sum())
    if total == 0.0:
        return Shares(0.0, 0.0, 0.0, 0.0, 0.0)
    between_columns = rows * float((values.mean(0) - centre).square().sum())
    between_rows = columns * float((values.mean(1) - centre).square().sum())
    left = float(values.square().sum()) - _first_singular_value(values) ** 2
    return Shares(
        columns=between_columns / total,
        rows=between_rows / total,
        jointly=1 - left / total,
        columns_by_chance=(columns - 1) / (rows * columns - 1),
        rows_by_chance=(rows - 1) / (rows * columns - 1),
    )


def analyze_model(model: PreTrainedModel) -> list[LinearShares]:
    """The shares of every linear of every decoder block, in the model's order.

    Args:
        model: a dense causal language model.

    Raises:
        ModelError: the model has no decoder blocks, is packed already, or a weight is not finite.
    """
    blocks = find_blocks(model)
    check_weights(blocks)
    found = []
    for block in blocks:
        for linear in block.linears:
            kind = linear.name.rpartition(".")[2]
            found.append(LinearShares(linear.name, block.index, kind, variance_shares(linear.weight)))
    return found


def compare_methods(
    model: PreTrainedModel, name: str, windows: Tensor, methods: Sequence[str] = tuple(METHODS)
) -> tuple[Tensor, list[Remainder]]:
    """Binarize one linear by several methods, calibrated on what the dense model passes it.

    Args:
        model: a dense causal language model.
        name: the linear's full name.
        windows: calibration tokens, int64 (N, L).
        methods: names of methods, with their defaults.

    Returns:
        W, float32 (n, m), and what each method makes of it.

    Raises:
        ConfigError: the model has no such linear, or a method is unknown.
        ModelError: the windows are longer than the model's positions.
    """
    blocks = find_blocks(model)
    target = next((block for block in blocks if any(linear.name == name for linear in block.linears)), None)
    if target is None:
        some = blocks[0].linears[0].name
        raise ConfigError(f"the model has no linear {name!r} in a decoder block; its first is {some}")
    check_windows(model, windows)
    weight, hessian = _reach(model, blocks, target, name, windows)
    remainders = []
    for method in methods:
        matrix = quantize_matrix(weight, hessian, _whole(BinarizationConfig(method)))
        approximation = matrix.dequantize(torch.float32)
        remainders.append(
            Remainder(
                method=method,
                true_bits=matrix.true_bits,
                weight_error=weight_error(weight, approximation),
                output_error=output_error(weight, approximation, hessian),
                columns=variance_shares(weight - approximation).columns,
                weight=approximation,
            )
        )
    return weight, remainders


def by_kind_and_depth(linears: Sequence[LinearShares]) -> dict[str, dict[str, Shares]]:
    """Mean shares by kind of linear, and of each kind by thirds of the model's depth and over `all` blocks."""
    blocks = 1 + max(linear.block for linear in linears)
    table: dict[str, dict[str, Shares]] = {}
    for kind in dict.fromkeys(linear.kind for linear in linears):
        own = [linear for linear in linears if linear.kind == kind]
        thirds: dict[str, list[LinearShares]] = {depth: [] for depth in DEPTHS}
        for linear in own:
            thirds[DEPTHS[3 * linear.block // blocks]].append(linear)
        table[kind] = {depth: _mean(members) for depth, members in (thirds | {"all": own}).items() if members}
    return table


def most_columnar(linears: Sequence[LinearShares]) -> LinearShares:
    """The linear whose columns differ most."""
    return max(linears, key=lambda linear: linear.shares.columns)


def mean_shares(linears: Sequence[LinearShares]) -> Shares:
    """The mean over all linears."""
    return _mean(linears)


def _mean(linears: Sequence[LinearShares]) -> Shares:
    values = [asdict(linear.shares) for linear in linears]
    return Shares(**{name: mean(value[name] for value in values) for name in values[0]})


def _first_singular_value(values: Tensor) -> float:
    """By power iteration: of a matrix without negative entries the first stands clear of the others."""
    vector = torch.ones(values.shape[1], dtype=values.dtype, device=values.device)
    for _ in range(POWER_STEPS):
        vector = values.T @ (values @ vector)
        vector /= vector.norm()
    return float((values @ vector).norm())


def _reach(
    model: PreTrainedModel, blocks: list[DecoderBlock], target: DecoderBlock, name: str, windows: Tensor
) -> tuple[Tensor, Tensor]:
    """The weight (n, m) and the Hessian (m, m) of one linear, the model run densely up to its block."""
    device = blocks[0].linears[0].weight.device
    hidden, calls = capture_inputs(model.eval(), blocks, windows, device)
    for block, call in zip(blocks, calls, strict=True):
        with resident(block.module, device):
            if block is not target:
                propagate(block, call.to(device), hidden)
                continue
            groups = gather_hessians(block, call.to(device), hidden)
            found = {linear.name: (linear, group.trusted()) for group in groups for linear in group.linears}
            linear, hessian = found[name]
            return linear.weight.float().clone(), hessian
    raise AssertionError("the block is one of the model's")


def _whole(config: BinarizationConfig) -> BinarizationConfig:
    """One matrix takes its budget as it is: there is nothing to share it with."""
    return config if config.bits is None else replace(config, allocation="uniform")
