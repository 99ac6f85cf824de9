"""How to binarize: one validated dataclass that round-trips through config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from arbllm.binarize.methods import get_method
from arbllm.errors import ConfigError

PARTITIONS = ("none", "column", "group", "column+group", "cgb")
GROUPS = (2, 4)
SPLITS = ("weight", "saliency")
COMPENSATIONS = ("exact", "reference")


@dataclass(frozen=True)
class BinarizationConfig:
    """Method and options for every linear layer of a model.

    >>> BinarizationConfig(method="arb-x", partition="cgb")

    Attributes:
        method: a name from `arbllm.binarize.methods.METHODS`: billm, arb, arb-x, arb-rc.
        partition: how weights share parameters. `none`: one zone a block; `column`: salient columns apart, with two
            signs a weight; `group`: large and small weights apart; `column+group`: both (BiLLM's three zones); `cgb`:
            both, and the salient columns in groups too (the paper's column-group bitmap, four zones).
        groups: 2 (a 1-bit group bitmap) or 4 (2 bits).
        block_size: columns of a block, K.
        iterations: alternating refinement steps, T; a block stops sooner when its error no longer falls.
        split_on: choose the group threshold by the error of the `weight` itself, or of the `saliency` matrix as the
            paper's reference implementation does.
        compensation: how a block's error is spread over later columns: `exact` (the least-squares optimum) or
            `reference` (as BiLLM and the paper).
        damping: lambda, in units of the mean of diag H.

    Raises:
        ConfigError: an option is out of range; the message lists what is allowed.
    """

    method: str = "arb-rc"
    partition: str = "cgb"
    groups: int = 2
    block_size: int = 128
    iterations: int = 15
    split_on: str = "weight"
    compensation: str = "exact"
    damping: float = 0.01

    def __post_init__(self) -> None:
        get_method(self.method)
        for name, allowed in (
            ("partition", PARTITIONS),
            ("groups", GROUPS),
            ("split_on", SPLITS),
            ("compensation", COMPENSATIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is unknown; choose one of {', '.join(map(str, allowed))}")
        for name, least in (("block_size", 8), ("iterations", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not 0 < self.damping < 1:
            raise ConfigError(f"damping must lie between 0 and 1, not {self.damping!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BinarizationConfig:
        """Rebuild from `to_dict`.

        Raises:
            ConfigError: a field is unknown, or its value is not allowed.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**values)
