"""Adam on scales and norms, the best state on held-out text kept; what was stopped in its middle can go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from arbllm.model.ranks import Ranks
from arbllm.tunable import TunableLinear

CHECKS = 4
PATIENCE = 2  # checks in a row without a gain
KEEP_SECONDS = 60.0
SCALE_RATE, NORM_RATE = 3e-3, 1e-3
HALF_GRADIENTS = 2.0**10  # times the loss of a model in float16, whose gradients would be 0; Adam does not mind
_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what it knows of a parameter that has had a gradient


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


@dataclass(frozen=True)
class Training:
    """A training in its middle.

    Attributes:
        tensors: of parameter number i, `parameter.i`; what Adam knows of it, `step.i`, `exp_avg.i`, `exp_avg_sq.i`,
            where it has had a gradient; and `best.i`, what it is in the best state.
        values: plain: `losses` of the steps so far, and of the `best` state `before`, `loss`, `step` and `misses`.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Keeper(Protocol):
    """Keeps a training where it outlives the process."""

    def training(self) -> Training | None:
        """What was kept last, None for nothing."""

    def keep_training(self, training: Training) -> None:
        """Keep it in the place of what was kept before."""


class Trainer:
    """Adam with a cosine schedule over scales and norms, which alone require gradients until `finish`.

    Norms in half precision are trained as float32, since a step is less than half precision can tell: the module has
    them rounded.

    Attributes:
        parameters: all that is trained, in float32 or finer.
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
        finer = [norm if norm.dtype.itemsize >= 4 else nn.Parameter(norm.detach().float()) for norm in norms]
        self.parameters = [*scales, *finer]
        self._rounded = {fine: norm for fine, norm in zip(finer, norms, strict=True) if fine is not norm}
        for parameter in [*self.parameters, *norms]:
            parameter.requires_grad_(True)
        self._times = HALF_GRADIENTS if any(norm.dtype == torch.float16 for norm in norms) else 1.0
        groups: list[dict[str, Any]] = [{"params": scales, "lr": tuning.rate}]
        groups += [{"params": [norm], "lr": NORM_RATE * float(norm.detach().abs().mean())} for norm in finer]
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
        keeper: Keeper | None = None,
    ) -> Best:
        """Take all steps, or stop when the held-out loss no longer falls; leaves the best state and `finish`es.

        Args:
            loss: of a step, by its number from 0.
            measure: the held-out loss; asked for before the first step, CHECKS times between, and after the last one.
            fewest: steps from one such time to the next, at least.
            on_step: told of (steps done, steps in all, loss of the last one).
            keeper: keeps the training every KEEP_SECONDS, and has it where it was stopped; of steps done before,
                `on_step` is told again.
        """
        tell, kept = on_step or _ignore, time.perf_counter()
        found = keeper.training() if keeper else None
        best, losses = self._go_on(found) if found else (Best(self.parameters, measure()), [])
        for step, before in enumerate(losses):
            tell(step + 1, self._steps, before)
        stride = max(self._steps // CHECKS, min(self._steps, fewest), 1)
        for step in range(len(losses), self._steps):
            value = loss(step)
            self.step(step, value)
            losses.append(float(value.detach()))
            tell(step + 1, self._steps, losses[-1])
            due = (step + 1) % stride == 0 or step + 1 == self._steps
            if due and not best.offer(measure(), step + 1):
                break
            if keeper and time.perf_counter() - kept >= KEEP_SECONDS:
                keeper.keep_training(self._training(best, losses))
                kept = time.perf_counter()
        best.restore()
        self._round()
        self.finish()
        return best

    def step(self, step: int, loss: Tensor) -> None:
        """One step down the gradient of `loss`, its mean over all ranks."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / self._steps))
        self._optimizer.zero_grad(set_to_none=True)
        (self._times * loss).backward()
        for fine, norm in self._rounded.items():
            fine.grad, norm.grad = None if norm.grad is None else norm.grad.float(), None
        if self._ranks.count > 1:  # an expert may have run on some of them
            for each in self.parameters:
                each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        self._ranks.average([each.grad for each in self.parameters if each.grad is not None])
        self._optimizer.step()
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """Give the module the norms as they are now."""
        for fine, norm in self._rounded.items():
            norm.copy_(fine)

    def _training(self, best: Best, losses: list[float]) -> Training:
        tensors: dict[str, Tensor] = {}
        for number, (parameter, state) in enumerate(zip(self.parameters, best.state, strict=True)):
            named = {"parameter": parameter.detach(), "best": state, **self._optimizer.state.get(parameter, {})}
            tensors |= {f"{name}.{number}": tensor for name, tensor in named.items()}
        return Training(tensors, {"losses": losses, "best": best.values()})

    @torch.no_grad()
    def _go_on(self, found: Training) -> tuple[Best, list[float]]:
        """Put a training back that was stopped."""
        tensors, losses = found.tensors, list(found.values["losses"])
        for number, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"parameter.{number}"])
            adam = {name: tensors[key] for name in _ADAM if (key := f"{name}.{number}") in tensors}
            if adam:
                moments = {name: adam[name].to(parameter.device) for name in _ADAM[1:]}
                self._optimizer.state[parameter] = {"step": adam["step"], **moments}
        self._round()
        states = [tensors[f"best.{number}"].to(each.device) for number, each in enumerate(self.parameters)]
        return Best.again(self.parameters, states, found.values["best"]), losses

    def finish(self) -> None:
        """Leave the parameters as ordinary ones."""
        for parameter in [*self.parameters, *self._rounded.values()]:
            parameter.requires_grad_(False)
            parameter.grad = None


class Best:
    """The state of parameters with the least loss so far.

    Attributes:
        state: the parameters.
        before: the loss of the first state.
        loss: the least one.
        misses: how many states in a row have not been better.
        step: after how many steps it was reached.
    """

    def __init__(self, parameters: list[nn.Parameter], loss: float) -> None:
        self._parameters = parameters
        self.state: list[Tensor] = []
        self.before, self.loss, self.step, self.misses = loss, math.inf, 0, 0
        self.offer(loss, 0)

    @classmethod
    def again(cls, parameters: list[nn.Parameter], state: list[Tensor], values: Mapping[str, Any]) -> Best:
        """The same once more, from its `state` and `values`."""
        best = cls(parameters, values["before"])
        best.state, best.loss = state, values["loss"]
        best.step, best.misses = values["step"], values["misses"]
        return best

    def values(self) -> dict[str, Any]:
        """All but the state, plain."""
        return {"before": self.before, "loss": self.loss, "step": self.step, "misses": self.misses}

    def offer(self, loss: float, step: int) -> bool:
        """Keep the present state if its loss is the least; returns whether it is worth going on."""
        self.misses += 1
        if loss < self.loss or not self.state:
            self.loss, self.step, self.misses = loss if math.isfinite(loss) else math.inf, step, 0
            self.state = [parameter.detach().clone() for parameter in self._parameters]
        return self.misses < PATIENCE

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back."""
        for parameter, value in zip(self._parameters, self.state, strict=True):
            parameter.copy_(value)


def _ignore(*_: object) -> None:
    pass
