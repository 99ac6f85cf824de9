"""Tuning of a decoder block's scales and norms, signs and groups frozen, against what the dense model has there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arbllm.format.matrix import BinaryMatrix
from arbllm.model.capture import BlockCall
from arbllm.model.ranks import Ranks
from arbllm.model.walk import DecoderBlock, Linear
from arbllm.tunable import TunableLinear

CHECKS = 4
PATIENCE = 2  # checks in a row without a gain
HELD_OUT_SHARE = 8
SCALE_RATE, NORM_RATE = 3e-3, 1e-3


@dataclass(frozen=True)
class Tuning:
    """How long and how fast scales are tuned.

    Attributes:
        steps: Adam steps for each decoder block, one calibration window each.
        rate: learning rate of the scales' logarithms; it falls to zero as a cosine.
        seed: of the order of the windows.
        length: tokens of each window that are used, from its beginning; for a step is as dear as it has tokens.
    """

    steps: int = 40
    rate: float = SCALE_RATE
    seed: int = 0
    length: int = 512


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


class Trainer:
    """Adam with a cosine schedule over scales and norms, which alone require gradients until `finish`.

    Attributes:
        parameters: all that is trained.
    """

    def __init__(
        self,
        layers: Iterable[TunableLinear],
        norms: Sequence[nn.Parameter],
        tuning: Tuning,
        ranks: Ranks | None = None,
    ) -> None:
        """Norms learn at a rate of their own, in units of their size."""
        scales = [change for layer in layers for change in (layer.row_changes, layer.column_changes)]
        self.parameters = [*scales, *norms]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        groups: list[dict[str, Any]] = [{"params": scales, "lr": tuning.rate}]
        groups += [{"params": [norm], "lr": NORM_RATE * float(norm.detach().abs().mean())} for norm in norms]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        self._rates = [group["lr"] for group in groups]
        self._steps = tuning.steps
        self._ranks = ranks or Ranks()

    def run(
        self,
        loss: Callable[[int], Tensor],
        measure: Callable[[], float],
        fewest: int = 1,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> Best:
        """Take all steps, or stop when the held-out loss no longer falls; leaves the best state and `finish`es.

        Args:
            loss: of a step, by its number from 0.
            measure: the held-out loss; asked for before the first step, CHECKS times between, and after the last one.
            fewest: steps from one such time to the next, at least.
            on_step: told of (steps done, steps in all, loss of the last one).
        """
        best = Best(self.parameters, measure())
        stride = max(self._steps // CHECKS, min(self._steps, fewest), 1)
        for step in range(self._steps):
            value = loss(step)
            self.step(step, value)
            if on_step:
                on_step(step + 1, self._steps, float(value.detach()))
            due = (step + 1) % stride == 0 or step + 1 == self._steps
            if due and not best.offer(measure(), step + 1):
                break
        best.restore()
        self.finish()
        return best

    def step(self, step: int, loss: Tensor) -> None:
        """One step down the gradient of `loss`, its mean over all ranks."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / self._steps))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._ranks.average([each.grad for each in self.parameters if each.grad is not None])
        self._optimizer.step()

    def finish(self) -> None:
        """Leave the parameters as ordinary ones."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


class Best:
    """The state of parameters with the least loss so far.

    Attributes:
        before: the loss of the first state.
        loss: the least one.
        misses: how many states in a row have not been better.
        step: after how many steps it was reached.
    """

    def __init__(self, parameters: list[nn.Parameter], loss: float) -> None:
        self._parameters = parameters
        self._state: list[Tensor] = []
        self.before, self.loss, self.step, self.misses = loss, math.inf, 0, 0
        self.offer(loss, 0)

    def offer(self, loss: float, step: int) -> bool:
        """Keep the present state if its loss is the least; returns whether it is worth going on."""
        self.misses += 1
        if loss < self.loss:
            self.loss, self.step, self.misses = loss, step, 0
            self._state = [parameter.detach().clone() for parameter in self._parameters]
        return self.misses < PATIENCE

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back."""
        for parameter, value in zip(self._parameters, self._state, strict=True):
            parameter.copy_(value)
