"""Run one decoder block at a time over the calibration windows, and gather the Hessians of its linears.

The model itself runs only as far as its first block, except once: for the first window its forward pass is followed
through all blocks, each replaced by a recorder, to learn what the model passes to them (masks and rotary embeddings
differ from block to block where attention slides). From then on a block is called with its own recorded arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from arbllm.errors import ModelError
from arbllm.model.walk import DecoderBlock, Linear

HIDDEN_STATES = "hidden_states"
STRIPS = 4


@dataclass(frozen=True)
class BlockCall:
    """How the model calls a block: every argument but the hidden states.

    Attributes:
        args: positional arguments after the hidden states; all of them where the hidden states come by name.
        kwargs: named arguments without the hidden states.
        by_name: whether the hidden states come by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    by_name: bool

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
        """Take the hidden states (1, L, d) out of a recorded call."""
        if HIDDEN_STATES in kwargs:
            rest = {name: value for name, value in kwargs.items() if name != HIDDEN_STATES}
            return kwargs[HIDDEN_STATES], cls(args, rest, by_name=True)
        return args[0], cls(args[1:], dict(kwargs), by_name=False)

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output (1, L, d) for `hidden` (1, L, d)."""
        output = self.put(block, hidden)
        return output if isinstance(output, Tensor) else output[0]

    def put(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """All that the block returns for `hidden` (1, L, d)."""
        if self.by_name:
            return block(*self.args, **{HIDDEN_STATES: hidden}, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)

    def to(self, device: torch.device) -> BlockCall:
        """The same call for a block that runs on `device`, in the dtypes that `compute_dtype` gives."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, compute_dtype(tensor.dtype, device))

        return BlockCall(_map_tensors(self.args, move), _map_tensors(self.kwargs, move), self.by_name)

    def same_tensors(self, other: BlockCall) -> bool:
        """Whether both calls pass the same tensors."""
        mine, others = _tensors((self.args, self.kwargs)), _tensors((other.args, other.kwargs))
        return len(mine) == len(others) and all(map(torch.equal, mine, others))


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same input, and its Hessian.

    Attributes:
        linears: one or more.
        hessian: H = (2 / N) sum x x^T over the N tokens of all windows, float32 (m, m); zero where N is.
        tokens: N; zero for an expert that no token was sent to.
    """

    linears: tuple[Linear, ...]
    hessian: Tensor
    tokens: int

    @property
    def sampling_error(self) -> float:
        """sqrt(m / N): about what entries of H off its diagonal are wrong by, in units of sqrt(H_ii H_jj).

        Shrunk by so much (see `factorize`), H gives less error on text that it was not measured on.
        """
        return float((self.hessian.shape[0] / self.tokens) ** 0.5) if self.tokens else 0.0

    def trusted(self) -> Tensor:
        """H, of whose diagonal the zeros of an expert's are made the mean of the rest, or 1 without any, in place.

        That an input never fired on the few tokens that came to an expert does not say that it never will.
        """
        diagonal = self.hessian.diagonal()
        silent = diagonal <= 0
        if self.linears[0].routed and silent.any():
            diagonal[silent] = 1.0 if silent.all() else diagonal[~silent].mean()
        return self.hessian


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the stored one, but float32 for half precision on a CPU, where it is slow and coarse."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and device.type == "cpu" else dtype


@torch.no_grad()
def capture_inputs(
    model: PreTrainedModel, blocks: Sequence[DecoderBlock], windows: Tensor, device: torch.device
) -> tuple[Tensor, list[BlockCall]]:
    """The hidden states that enter the first block, and how each block is called.

    Args:
        model: in evaluation mode.
        blocks: its decoder blocks.
        windows: token windows, int64 (N, L).
        device: where the blocks will run.

    Returns:
        Hidden states (N, L, d) on `device`, in the dtype that the blocks compute in; and one call per block, where the
        model made it (see `BlockCall.to`).

    Raises:
        ModelError: the model does not call its blocks one after the other, or passes them something else for each text.
    """
    run = partial(model, use_cache=False)
    _, embedding = next(_named_tensors(model.get_input_embeddings()))
    ids = windows.to(embedding.device)
    first, calls = _follow(run, blocks, ids[:1])
    states = [first]
    for window in ids[1:, None]:  # split would make one empty window of none
        hidden, call = _stop_at_first(run, blocks[0], window)
        if not call.same_tensors(calls[0]):
            raise ModelError(
                f"{blocks[0].name}: the model passes its blocks other values for each text, beside the hidden states; "
                "such an architecture cannot be calibrated block by block"
            )
        states.append(hidden)
    dtype = compute_dtype(first.dtype, device)
    return torch.cat([state.to(device, dtype) for state in states]), calls


@torch.no_grad()
def gather_hessians(
    block: DecoderBlock, call: BlockCall, hidden: Tensor, outputs: Tensor | None = None
) -> list[InputGroup]:
    """Run the block over all windows and accumulate H of its linears as a stream.

    Args:
        block: the block, where and as it computes (see `resident`).
        call: its arguments, moved likewise.
        hidden: its inputs (N, L, d); they are not changed.
        outputs: where to put its outputs, (N, L, d); None drops them.

    Raises:
        ModelError: a linear that is not an expert's never ran; names it.
    """
    recorder = _InputRecorder(block.linears)
    with recorder.attached():
        for index, window in enumerate(hidden.split(1)):
            output = call(block.module, window.clone())  # a block may write to its input
            if outputs is not None:
                outputs[index] = output[0]
            recorder.end_window()
    return recorder.groups()


@torch.no_grad()
def propagate(block: DecoderBlock, call: BlockCall, hidden: Tensor) -> None:
    """Replace the block's inputs (N, L, d) by its outputs, window by window, in place."""
    for window in hidden.split(1):
        window.copy_(call(block.module, window.clone()))


@contextmanager
def resident(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a block to `device` and to the dtypes that it computes in; put what is left of it back at the end."""
    homes = {}
    for name, tensor in _named_tensors(block):
        homes[name] = tensor.device, tensor.dtype
        tensor.data = tensor.data.to(device, compute_dtype(tensor.dtype, device))
    try:
        yield
    finally:
        for name, tensor in _named_tensors(block):
            if name in homes:
                tensor.data = tensor.data.to(*homes[name])


@contextmanager
def intercepted(blocks: Sequence[DecoderBlock], instead: Callable[..., Any]) -> Iterator[None]:
    """Inside, a block's forward method is `instead(index, forward, *args, **kwargs)`, `forward` being its own."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            module = block.module
            stack.callback(_restore_forward, module, module.__dict__.get("forward"))
            module.forward = partial(instead, index, module.forward)
        yield


class _InputRecorder:
    """Accumulates sum x x^T for every distinct input of a set of linears.

    Linears that are given the very same tensor the first time that they run share one accumulator.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears
        self._leaders: dict[Linear, Linear] = {}
        self._sums: dict[Linear, Tensor] = {}
        self._tokens: dict[Linear, int] = {}
        self._seen: list[tuple[Tensor, int, Linear]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for linear in self._linears:
                hook = linear.module.register_forward_pre_hook(partial(self._observe, linear), with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def end_window(self) -> None:
        self._seen.clear()

    def groups(self) -> list[InputGroup]:
        for linear in self._linears:
            if linear not in self._leaders and linear.routed:
                columns = linear.weight.shape[1]
                self._leaders[linear], self._tokens[linear] = linear, 0
                self._sums[linear] = torch.zeros(columns, columns, dtype=torch.float32, device=linear.weight.device)
            elif linear not in self._leaders:
                raise ModelError(
                    f"{linear.name}: never ran on the calibration text; calibrate on more windows if it is an expert's "
                    "(if the model uses its weight without calling it, such an architecture is not supported)"
                )
        members: dict[Linear, list[Linear]] = {}  # in the order of the linears, whichever expert ran first
        for linear in self._linears:
            members.setdefault(self._leaders[linear], []).append(linear)
        groups = []
        for leader, linears in members.items():
            tokens = self._tokens[leader]
            hessian = _mirror_upper(self._sums[leader]).mul_(2 / max(tokens, 1))
            groups.append(InputGroup(tuple(linears), hessian, tokens))
        return groups

    def _observe(self, linear: Linear, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not tensor.numel():
            return  # an expert that no token was sent to
        if linear not in self._leaders:
            self._leaders[linear] = self._leader_of(tensor) or linear
            self._seen.append((tensor, tensor._version, linear))
        if self._leaders[linear] is linear:
            self._add(linear, tensor)

    def _leader_of(self, tensor: Tensor) -> Linear | None:
        """The linear that was given this tensor, unchanged since, earlier in this window."""
        for seen, version, linear in self._seen:
            if seen is tensor and version == tensor._version:
                return self._leaders[linear]
        return None

    def _add(self, linear: Linear, tensor: Tensor) -> None:
        rows = tensor.reshape(-1, tensor.shape[-1]).float()
        if linear not in self._sums:
            self._sums[linear] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
            self._tokens[linear] = 0
        _add_upper(self._sums[linear], rows)
        self._tokens[linear] += rows.shape[0]


def _add_upper(total: Tensor, rows: Tensor) -> None:
    """Add x x^T of every row x of `rows` (N, m) to `total` (m, m): at and above the diagonal, the rest is a by-product.

    A product of two matrices does not know that its result is symmetric; strips down to the diagonal save most of the
    lower half.
    """
    columns = total.shape[0]
    height = -(-columns // STRIPS)
    for start in range(0, columns, height):
        stop = min(start + height, columns)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def _mirror_upper(total: Tensor) -> Tensor:
    """Fill in what lies below the diagonal, in place."""
    lower = total.triu(1).T
    return total.triu_().add_(lower)


class _StopForwardError(Exception):
    """Ends a forward pass once everything has been recorded."""


def _follow(run: Callable[..., Any], blocks: Sequence[DecoderBlock], ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Follow one window through all blocks; only the first really runs, to show whether blocks return a tuple."""
    entered: list[Tensor] = []
    calls: list[BlockCall] = []
    tails: list[tuple[Any, ...] | None] = []

    def record(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index != len(calls):
            raise ModelError(f"{blocks[index].name}: the model does not call its blocks one after the other")
        hidden, call = BlockCall.split(args, kwargs)
        calls.append(call)
        if index == 0:
            entered.append(hidden.clone())
        if len(calls) == len(blocks):
            raise _StopForwardError
        if index == 0:
            output = forward(*args, **kwargs)
            tails.append(None if isinstance(output, Tensor) else tuple(output[1:]))
        return hidden if tails[0] is None else (hidden, *tails[0])

    with intercepted(blocks, record):
        try:
            run(input_ids=ids)
        except _StopForwardError:
            return entered[0], calls
    raise ModelError(f"{blocks[len(calls)].name}: the model never calls this block; it cannot be calibrated")


def _stop_at_first(run: Callable[..., Any], block: DecoderBlock, ids: Tensor) -> tuple[Tensor, BlockCall]:
    """The hidden states that one window brings to the first block."""
    recorded: list[tuple[Tensor, BlockCall]] = []

    def record(_: int, __: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        recorded.append(BlockCall.split(args, kwargs))
        raise _StopForwardError

    with intercepted([block], record):
        try:
            run(input_ids=ids)
        except _StopForwardError:
            return recorded[0]
    raise ModelError(f"{block.name}: the model never calls this block; it cannot be calibrated")


def _restore_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in its tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in `value`, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(value, keep)
    return found
