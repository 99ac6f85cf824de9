"""One block: partition it, then fit every zone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arbllm.binarize.block import Block, Part
from arbllm.binarize.methods import Method
from arbllm.binarize.partition import salient_columns, split_by_saliency, split_by_weight


class BlockFit(NamedTuple):
    """A fitted block and its error after the start and after each step, summed over zones."""

    block: Block
    errors: tuple[float, ...]


def binarize_block(
    weight: Tensor,
    saliency: Tensor,
    gram: Tensor,
    method: Method,
    *,
    partition: str = "cgb",
    groups: int = 2,
    iterations: int = 15,
    split_on: str = "weight",
) -> BlockFit:
    """Binarize one block of columns.

    Args:
        weight: W_b, float32 (n, K).
        saliency: s_ij = W_ij^2 / U_jj^2, float32 (n, K).
        gram: S, the block's X^T X up to a factor, float32 (K, K).
        method: how zones are fitted.
        partition: see `arbllm.BinarizationConfig`; likewise groups, iterations and split_on.
        groups: groups of a divided part, 2 or 4.
        iterations: T.
        split_on: "weight" or "saliency".

    Returns:
        The block, parameters in float32, and its error history.
    """
    assert method.fit, "a method with zones"
    width = weight.shape[1]
    if partition in ("column", "column+group", "cgb"):
        bitmap = salient_columns(saliency)
    else:
        bitmap = torch.zeros(width, dtype=torch.bool, device=weight.device)
    divided = {1: partition in ("group", "column+group", "cgb"), 2: partition == "cgb"}
    parts: dict[int, Part] = {}
    histories: list[tuple[float, ...]] = []
    for order, members in ((1, ~bitmap), (2, bitmap)):
        columns = members.nonzero().squeeze(1)
        if columns.numel() == 0:
            continue
        values, inner = weight[:, columns], gram[columns][:, columns] if method.calibrated else None
        if not divided[order]:
            masks = [torch.ones_like(values, dtype=torch.bool)]
        elif split_on == "weight":
            masks = _masks(split_by_weight(values, groups, method.has_means), groups)
        else:
            blanked = weight.shape[0] * (width - columns.numel()) if order == 1 else 0
            masks = _masks(split_by_saliency(saliency[:, columns], groups, blanked), groups)
        fits = [method.fit(values, mask, order, iterations, inner) for mask in masks]
        parts[order] = Part(columns, tuple(fit.zone for fit in fits))
        histories += [fit.errors for fit in fits]
    return BlockFit(Block(width, parts.get(1), parts.get(2)), _summed(histories))


def _masks(codes: Tensor, groups: int) -> list[Tensor]:
    """One mask a group from group numbers (n, k)."""
    return [codes == group for group in range(groups)]


def _summed(histories: list[tuple[float, ...]]) -> tuple[float, ...]:
    """Zones stop at different steps: a zone that has stopped keeps its last error."""
    longest = max(map(len, histories))
    padded = [errors + (errors[-1],) * (longest - len(errors)) for errors in histories]
    return tuple(map(sum, zip(*padded, strict=True)))
