"""The registry of methods. A new method is one file with a fit, one entry here, one test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from arbllm.binarize.alternating import fit_arb, fit_plain
from arbllm.binarize.calibrated import fit_arb_x
from arbllm.binarize.row_column import fit_arb_rc
from arbllm.binarize.steps import Fit
from arbllm.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """How the parameters of one zone are found; or that a matrix is solved in segments of columns, by `joint`.

    Attributes:
        name: as users type it.
        fit: ``fit(values (n, k), mask (n, k), order, iterations, gram (k, k) or None) -> Fit``; None for
            a method without zones of blocks.
        has_means: zones carry row means.
        has_column_scales: terms carry column scales.
        calibrated: `fit` needs `gram`, the block's S = X^T X.
        refined: parameters are refined in iterations.
    """

    name: str
    fit: Callable[[Tensor, Tensor, int, int, Tensor | None], Fit] | None
    has_means: bool = True
    has_column_scales: bool = False
    calibrated: bool = False
    refined: bool = True

    @property
    def joint(self) -> bool:
        """Whether scales, signs and groups are refined together, in segments of columns, within a budget of bits."""
        return self.fit is None


METHODS = {
    method.name: method
    for method in (
        Method("billm", fit_plain, refined=False),  # plain row means and scales
        Method("arb", fit_arb),  # the same, refined
        Method("arb-x", fit_arb_x, calibrated=True),  # the same, refined on calibration data
        Method("arb-rc", fit_arb_rc, has_means=False, has_column_scales=True),  # refined row and column scales
        Method("arb-rcx", None, has_means=False, has_column_scales=True),  # signs and groups, too, on calibration data
    )
}


def get_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        ConfigError: no such method; the message lists those that exist.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]
