"""What happens while a model is quantized, as plain records for a display or a log.

A job emits one `JobStarted`; then, for each decoder block, one `BlockStarted`, a `LinearQuantized` for each linear, a
`BlockTuned` if its scales are tuned, and one `BlockFinished`; last, where asked for, a `TeacherRead` for each piece of
text, a `DistillationStep` for each step and one `DistillationFinished`. Blocks are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_args


@dataclass(frozen=True)
class _Record:
    """Base of all events.

    Attributes:
        event: the kind, as logs name it.
    """

    event: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a line of JSON, `event` first."""
        return {"event": self.event, **asdict(self)}


@dataclass(frozen=True)
class JobStarted(_Record):
    """The model has been walked and checked.

    Attributes:
        blocks: decoder blocks.
        linears: linears in all blocks.
        weights: their weights.
    """

    event: ClassVar[str] = "job_started"
    blocks: int
    linears: int
    weights: int


@dataclass(frozen=True)
class BlockStarted(_Record):
    """Block `block` of `blocks` begins."""

    event: ClassVar[str] = "block_started"
    block: int
    blocks: int


@dataclass(frozen=True)
class LinearQuantized(_Record):
    """One linear has been binarized.

    Attributes:
        block: its decoder block.
        blocks: decoder blocks in all.
        name: its full name in the model, as in config.json.
        rows: output features, n.
        columns: input features, m.
        output_error: tr(D H D^T) / tr(W H W^T), D = W - W_hat.
        weight_error: ||D||_F^2 / ||W||_F^2.
        nominal_bits: signs per weight.
        true_bits: stored bits per weight, everything included.
        bytes: stored bytes, without the bias.
        damping: the damping factor that made the Hessian positive definite.
        seconds: time in the solver. Several linears of a block may be solved at the same time.
    """

    event: ClassVar[str] = "linear_quantized"
    block: int
    blocks: int
    name: str
    rows: int
    columns: int
    output_error: float
    weight_error: float
    nominal_bits: float
    true_bits: float
    bytes: int
    damping: float
    seconds: float


@dataclass(frozen=True)
class BlockTuned(_Record):
    """The scales and norms of block `block` have been tuned.

    Attributes:
        block: the decoder block.
        blocks: decoder blocks in all.
        before: relative squared error of its output on held-out windows, before.
        after: the same with the state that was kept.
        steps: steps that led to this state.
        seconds: wall-clock time.
    """

    event: ClassVar[str] = "block_tuned"
    block: int
    blocks: int
    before: float
    after: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class BlockFinished(_Record):
    """Block `block` is packed.

    Attributes:
        block: the decoder block.
        blocks: decoder blocks in all.
        seconds: wall-clock time of the block.
        capture_seconds: of it, the forward pass that gathers the Hessians.
        solve_seconds: of it, the solver.
        tune_seconds: of it, tuning.
        propagate_seconds: of it, the forward pass through the quantized block; 0 for the last block.
        peak_memory_bytes: the process's peak resident memory so far, or on a GPU the peak that tensors took there.
    """

    event: ClassVar[str] = "block_finished"
    block: int
    blocks: int
    seconds: float
    capture_seconds: float
    solve_seconds: float
    tune_seconds: float
    propagate_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class TeacherRead(_Record):
    """The dense model has read a piece of the text that its scales will be distilled from.

    Attributes:
        piece: pieces read.
        pieces: pieces in all.
    """

    event: ClassVar[str] = "teacher_read"
    piece: int
    pieces: int


@dataclass(frozen=True)
class DistillationStep(_Record):
    """A step of the distillation that follows the last block.

    Attributes:
        step: steps done.
        steps: steps in all.
        loss: divergence from the dense model's predictions on this step's text, in nats a token.
    """

    event: ClassVar[str] = "distillation_step"
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class DistillationFinished(_Record):
    """The whole model's scales and norms have been distilled.

    Attributes:
        before: divergence on held-out text before.
        after: the same with the state that was kept.
        steps: steps that led to this state.
        seconds: wall-clock time.
    """

    event: ClassVar[str] = "distillation_finished"
    before: float
    after: float
    steps: int
    seconds: float


Event = (
    JobStarted
    | BlockStarted
    | LinearQuantized
    | BlockTuned
    | BlockFinished
    | TeacherRead
    | DistillationStep
    | DistillationFinished
)
OnEvent = Callable[[Event], None]


def read_event(values: Mapping[str, Any]) -> Event:
    """An event from its `to_dict`.

    Raises:
        ValueError: there is no such event.
    """
    fields = dict(values)
    name = fields.pop("event", None)
    kinds: tuple[type[Event], ...] = get_args(Event)
    for kind in kinds:
        if kind.event == name:
            return kind(**fields)
    raise ValueError(f"no event is called {name!r}")
