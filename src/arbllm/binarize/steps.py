"""The loop that all refinements share: step until the error no longer falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from arbllm.binarize.block import Zone

# A step that lowers the error by less than this share of it counts as "no longer falls".
TOLERANCE = 1e-5


class Fit(NamedTuple):
    """A fitted zone and its error after the start and after each step that was kept."""

    zone: Zone
    errors: tuple[float, ...]


def refine(zone: Zone, step: Callable[[Zone], Zone], error: Callable[[Zone], float], iterations: int) -> Fit:
    """Apply `step` up to `iterations` times; stop, and drop the last step, once the error no longer falls."""
    errors = [error(zone)]
    for _ in range(iterations):
        candidate = step(zone)
        reached = error(candidate)
        if not reached < errors[-1]:
            break
        zone = candidate
        errors.append(reached)
        if errors[-2] - reached <= TOLERANCE * errors[-2]:
            break
    return Fit(zone, tuple(errors))
