"""How far a model's predictions move when some of its linears are disturbed as quantization will disturb them.

Gradients say how much each linear's error matters while errors are small and differ from token to token. Those of a
quantized weight are neither: they are the same weight's on every token. So linears are disturbed together, all of one
kind in one part of the depth, and the divergence that this causes is measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from arbllm.model.capture import resident
from arbllm.model.walk import DecoderBlock, Linear

DEPTHS = 3
PIECES, LENGTH = 2, 512  # tokens of each piece, at most

Group = tuple[str, int]


def group_linears(blocks: Sequence[DecoderBlock]) -> dict[Group, list[Linear]]:
    """Linears by kind, which is their name in the block without numbers, and by which third of the depth they are in.

    Experts of one block are of one kind.
    """
    groups: dict[Group, list[Linear]] = {}
    for place, block in enumerate(blocks):
        for linear in block.linears:
            kind = re.sub(r"\d+", "*", linear.name.removeprefix(f"{block.name}."))
            groups.setdefault((kind, place * DEPTHS // len(blocks)), []).append(linear)
    return groups


@torch.no_grad()
def measure_divergences(
    model: PreTrainedModel,
    groups: Mapping[Group, Sequence[Linear]],
    errors: Mapping[Linear, Tensor],
    windows: Tensor,
    device: torch.device,
) -> dict[Group, float]:
    """The divergence of a model's predictions from what they were, with one group after the other disturbed.

    Args:
        model: dense, in evaluation mode. It computes on `device` as a whole and is put back as it was.
        groups: of its linears.
        errors: what is added to each weight, (n, m) in any dtype, on any device.
        windows: text, int64 (N, L); of the last PIECES windows, LENGTH tokens are read once for each group.
        device: where to compute.

    Returns:
        KL(before || after), the mean over tokens, in nats.
    """
    pieces = windows[-PIECES:, :LENGTH].to(device)
    with resident(model, device):
        before = [_log_likelihoods(model, piece) for piece in pieces]
        found = {}
        for group, linears in groups.items():
            with _disturbed(linears, errors):
                total = sum(
                    float(
                        nn.functional.kl_div(_log_likelihoods(model, piece), wanted, log_target=True, reduction="sum")
                    )
                    for piece, wanted in zip(pieces, before, strict=True)
                )
            found[group] = total / pieces.numel()
    return found


@contextmanager
def _disturbed(linears: Sequence[Linear], errors: Mapping[Linear, Tensor]) -> Iterator[None]:
    """Inside, errors are added to the weights; afterwards they are exactly what they were."""
    weights = {linear: linear.weight for linear in linears}
    for linear, weight in weights.items():
        linear.set_weight(weight + errors[linear].to(weight))
    try:
        yield
    finally:
        for linear, weight in weights.items():
            linear.set_weight(weight)


def _log_likelihoods(model: PreTrainedModel, piece: Tensor) -> Tensor:
    """Of every token of the vocabulary after each one of `piece` (L,): float32 (L, vocabulary)."""
    logits: Tensor = model(input_ids=piece[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1)
