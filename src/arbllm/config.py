"""How to binarize: one validated dataclass that round-trips through config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from arbllm.binarize.methods import Method, get_method
from arbllm.errors import ConfigError

ALLOCATIONS = ("measured", "uniform")
PARTITIONS = ("none", "column", "group", "column+group", "cgb")
UNDIVIDED = ("none", "column")
"""Partitions without groups."""
GROUPS = (2, 4)
SPLITS = ("weight", "saliency")
COMPENSATIONS = ("exact", "reference")
PAPERS_OPTIONS = ("partition", "groups", "block_size", "split_on", "compensation")
JOINT_OPTIONS = ("allocation", "scale_block", "trellis")
DEFAULT_BITS, FEWEST_BITS, MOST_BITS = 2.25, 1.1, 4.0


@dataclass(frozen=True)
class BinarizationConfig:
    """Method and options for every linear layer of a model.

    >>> BinarizationConfig(bits=2.5)
    >>> BinarizationConfig(method="arb-x", partition="cgb")

    Attributes:
        method: a name from `arbllm.binarize.methods.METHODS`: arb-rcx, or billm, arb, arb-x, arb-rc as in the paper.
        partition: how weights share parameters in the paper's methods. `none`: one zone a block; `column`: salient
            columns apart, with two signs a weight; `group`: large and small weights apart; `column+group`: both
            (BiLLM's three zones); `cgb`: both, and the salient columns in groups too (the paper's column-group bitmap,
            four zones).
        groups: in the paper's methods, 2 (a 1-bit group bitmap) or 4 (2 bits).
        block_size: in the paper's methods, columns of a block, K.
        iterations: alternating refinement steps, T; they stop sooner when the error no longer falls.
        split_on: in the paper's methods, choose the group threshold by the error of the `weight` itself, or of the
            `saliency` matrix as the paper's reference implementation does.
        compensation: in the paper's methods, how a block's error is spread over later columns: `exact` (the
            least-squares optimum) or `reference` (as BiLLM and the paper).
        damping: lambda, in units of the mean of diag H.
        bits: with arb-rcx, the true bits a weight that a matrix may take, everything counted; None means 2.25.
        allocation: with arb-rcx, how the bits of a model are divided among its linears: `uniform`, or `measured`, by
            what the model's loss gains from them.
        scale_block: with arb-rcx, how many columns share row scales, about.
        trellis: with arb-rcx, whether signs are those of a trellis code (see `arbllm.binarize.code`): about a third
            less error at the same bits.

    Raises:
        ConfigError: an option is out of range; the message lists what is allowed.
    """

    method: str = "arb-rcx"
    partition: str = "cgb"
    groups: int = 2
    block_size: int = 128
    iterations: int = 15
    split_on: str = "weight"
    compensation: str = "exact"
    damping: float = 0.01
    bits: float | None = None
    allocation: str = "measured"
    scale_block: int = 512
    trellis: bool = True

    def __post_init__(self) -> None:
        self._check_bits(get_method(self.method))
        for name, allowed in (
            ("allocation", ALLOCATIONS),
            ("partition", PARTITIONS),
            ("groups", GROUPS),
            ("split_on", SPLITS),
            ("compensation", COMPENSATIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is unknown; choose one of {', '.join(map(str, allowed))}")
        for name, least in (("block_size", 8), ("scale_block", 8), ("iterations", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if type(self.trellis) is not bool:
            raise ConfigError(f"trellis must be true or false, not {self.trellis!r}")
        if not 0 < self.damping < 1:
            raise ConfigError(f"damping must lie above 0 and below 1, not {self.damping!r}")

    def _check_bits(self, method: Method) -> None:
        if not method.joint:
            if self.bits is not None:
                raise ConfigError(f"bits cannot be chosen with method {self.method!r}; choose arb-rcx, or leave it out")
            return
        if self.bits is None:
            object.__setattr__(self, "bits", DEFAULT_BITS)
        if not isinstance(self.bits, (int, float)) or not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise ConfigError(f"bits must lie between {FEWEST_BITS} and {MOST_BITS}, not {self.bits!r}")

    def check_options(self) -> None:
        """Refuse what somebody has chosen and makes no difference.

        Raises:
            ConfigError: an option is not the default one, and not one of the method's; names it.
        """
        method = get_method(self.method)
        others = "one of the paper's methods, such as arb-rc" if method.joint else "arb-rcx"
        useless: list[tuple[tuple[str, ...], str, str]] = [
            (PAPERS_OPTIONS if method.joint else JOINT_OPTIONS, f"method {self.method!r}", others)
        ]
        if not method.refined:
            useless.append((("iterations",), f"method {self.method!r}", "one that refines, such as arb-rc"))
        if self.partition in UNDIVIDED:
            useless.append((("groups", "split_on"), f"partition {self.partition!r}", "one with groups, such as cgb"))
        for names, place, instead in useless:
            for name in names:
                if getattr(self, name) != getattr(BinarizationConfig, name):
                    raise ConfigError(f"{name} is no option of {place}; leave it out, or choose {instead}")

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
