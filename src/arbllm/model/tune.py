"""Tuning of a decoder block's scales and norms, signs and groups frozen, against what the dense model has there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arbllm.format.matrix import BinaryMatrix
from arbllm.model.capture import BlockCall, propagate
from arbllm.model.ranks import Ranks
from arbllm.model.training import Trainer, Tuning
from arbllm.model.walk import DecoderBlock, Linear
from arbllm.tunable import TunableLinear

HELD_OUT_SHARE = 8


class Goal(NamedTuple):
    """What a block is tuned toward.

    Attributes:
        states: what the block reads in the dense model, of the first tokens of each window, (N, l, d); once the block
            was run, what it puts out there.
        call: calls the block with so many tokens.
    """

    states: Tensor
    call: BlockCall

    def propagate(self, block: DecoderBlock, device: torch.device) -> None:
        """Run a block, which is dense and on `device`."""
        propagate(block, self.call.to(device), self.states)


class Tuned(NamedTuple):
    """The tuned matrices, and the loss on held-out windows before and after, over `steps` steps that were taken."""

    matrices: dict[Linear, BinaryMatrix]
    before: float
    after: float
    steps: int


def tune_block(
    block: DecoderBlock,
    call: BlockCall,
    hidden: Tensor,
    targets: Tensor,
    matrices: Mapping[Linear, BinaryMatrix],
    tuning: Tuning,
    ranks: Ranks | None = None,
) -> Tuned:
    """Adam on row scales, column scales and norm weights; the best state on held-out windows is kept.

    The loss is the squared error of the block's output over its squared norm, averaged over tokens. Every eighth window
    (one at least, where there are two) is held out; tuning stops early when the loss there no longer falls.

    Args:
        block: the block, resident where it computes; its norms are changed in place.
        call: its arguments.
        hidden: its inputs, from the quantized blocks before it, (N, L, d).
        targets: the block's outputs in the dense model for the same tokens, (N, L, d): earlier errors are made up for.
        matrices: its packed linears.
        tuning: how long and how fast.
        ranks: processes that have other windows, each with as many to tune on; a step takes one of each.
    """
    ranks = ranks or Ranks()
    layers = {linear: TunableLinear(matrix, linear.module.bias) for linear, matrix in matrices.items()}
    for linear, layer in layers.items():
        block.module.set_submodule(linear.name.removeprefix(f"{block.name}."), layer)
    block.module.requires_grad_(False)
    norms = norm_weights(block.module)
    train = len(hidden) - max(1, len(hidden) // HELD_OUT_SHARE) or 1  # a single window is all there is
    held_out = range(min(train, len(hidden) - 1), len(hidden))
    order = torch.randperm(train, generator=torch.Generator().manual_seed(tuning.seed + block.index)).tolist()

    def loss(window: int) -> Tensor:
        output = call(block.module, hidden[window : window + 1].clone())
        return relative_error(output, targets[window : window + 1])

    def measure() -> float:
        with torch.no_grad():
            return ranks.mean(sum(float(loss(window)) for window in held_out) / len(held_out))

    trainer = Trainer(layers.values(), norms, tuning, ranks)
    best = trainer.run(lambda step: loss(order[step % train]), measure)
    return Tuned({linear: layer.to_matrix() for linear, layer in layers.items()}, best.before, best.loss, best.step)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ||output - target||^2 / ||target||^2, both (..., d)."""
    error = (output.float() - target.float()).square().sum(-1)
    return (error / target.float().square().sum(-1).clamp(min=1e-12)).mean()


def norm_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weights of the norms in a module: vectors named `weight`."""
    return [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim == 1 and name.rpartition(".")[2] == "weight"
    ]
