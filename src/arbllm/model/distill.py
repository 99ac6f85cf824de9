"""Distillation of a whole packed model's scales and norms, signs and groups frozen, from the dense model's logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from arbllm.errors import ModelError
from arbllm.model.capture import compute_dtype
from arbllm.model.events import DistillationFinished, DistillationStep, OnEvent, TeacherRead
from arbllm.model.head import split_head
from arbllm.model.training import Keeper, Trainer, Tuning
from arbllm.model.tune import norm_weights
from arbllm.model.walk import replace_module
from arbllm.nn import BinaryLinear, PackedModule
from arbllm.tunable import TunableLinear

FEWEST_STEPS = 8  # between two measurements of the held-out loss
HELD_OUT = 2
LENGTH = 512
DISTILLATION_RATE, ENOUGH_STEPS = 4e-3, 32

Teacher = Callable[[int], Tensor]
OnCount = Callable[[int, int], None]


class Distilled(NamedTuple):
    """The mean divergence of the packed model's predictions on held-out text, in nats a token, and the steps kept."""

    before: float
    after: float
    steps: int


def distill_model(
    model: PreTrainedModel,
    open_teacher: Callable[[], PreTrainedModel],
    windows: Tensor,
    tuning: Tuning,
    device: torch.device,
    emit: OnEvent,
    keeper: Keeper | None = None,
) -> None:
    """Distil on a device, in the dtype that it computes in, and put the model back as it was.

    Args:
        model: packed, as `quantize_model` leaves it; changed in place.
        open_teacher: loads the dense model; all but its head is let go before the packed one moves to the device.
        windows: text, int64 (N, L).
        tuning: steps in all, rate and seed.
        device: where to compute.
        emit: told of every piece that the dense model reads, of every step and of the end.
        keeper: where the training is kept from time to time, and gone on with.
    """
    start, home = time.perf_counter(), model.device
    lessons = choose_lessons(windows, tuning)
    dense = open_teacher()
    _move(dense, device)
    teacher = read_lessons(dense, lessons, lambda *count: emit(TeacherRead(*count)))
    del dense
    kept, dtypes = _plain_buffers(model), {name: each.dtype for name, each in model.named_parameters()}
    _move(model, device)
    result = distill(model, teacher, lessons, tuning, lambda *step: emit(DistillationStep(*step)), keeper)
    model.to(home)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    _put_back(model, kept)
    emit(DistillationFinished(*result, seconds=time.perf_counter() - start))


def distillation_rate(steps: int) -> float:
    """The learning rate for so many steps: fewer than ENOUGH_STEPS cannot make up for what the first ones spoil."""
    return DISTILLATION_RATE * min(1.0, steps / ENOUGH_STEPS)


class Lessons(NamedTuple):
    """What is learnt from: pieces of text, int64 (pieces, L), those of each step in turn, and those held out."""

    pieces: Tensor
    train: list[int]
    held_out: list[int]


def choose_lessons(windows: Tensor, tuning: Tuning) -> Lessons:
    """Cut windows (N, L) to pieces of at most LENGTH tokens, one a step; the last two pieces are held out.

    Raises:
        ModelError: fewer than three pieces of text.
    """
    pieces = cut_pieces(windows)
    count = len(pieces) - HELD_OUT
    order = torch.randperm(count, generator=torch.Generator().manual_seed(tuning.seed)).tolist()
    train = [order[step % count] for step in range(tuning.steps)]
    return Lessons(pieces, train, list(range(count, len(pieces))))


@torch.no_grad()
def read_lessons(model: PreTrainedModel, lessons: Lessons, on_piece: OnCount | None = None) -> Teacher:
    """What a dense model predicts for each piece, as a function of the piece's number: logits (L, vocabulary).

    Its last hidden states are kept and its head, if its logits are no more than that: it reads each piece once, however
    often that is learnt from, and need not stay in memory. Of other models logits are computed anew each time.

    Args:
        model: in evaluation mode.
        lessons: what will be asked for.
        on_piece: told of (pieces read, pieces in all).
    """
    head, device = split_head(model), model.device

    def ids(piece: int) -> Tensor:
        return lessons.pieces[piece : piece + 1].to(device)

    if head is None:
        return torch.no_grad()(lambda piece: model(input_ids=ids(piece), use_cache=False).logits[0])
    wanted = sorted({*lessons.train, *lessons.held_out})
    places = {piece: place for place, piece in enumerate(wanted)}
    states = torch.empty(0)
    for piece, place in places.items():
        hidden = model.base_model(input_ids=ids(piece), use_cache=False).last_hidden_state[0]
        if place == 0:  # one tensor for all, so that memory between activations is not broken to pieces
            states = hidden.new_empty(len(wanted), *hidden.shape, device="cpu")
        states[place] = hidden
        if on_piece:
            on_piece(place + 1, len(wanted))
    return torch.no_grad()(lambda piece: head(states[places[piece]].to(device)))


def distill(
    model: PreTrainedModel,
    teacher: Teacher,
    lessons: Lessons,
    tuning: Tuning,
    on_step: Callable[[int, int, float], None] | None = None,
    keeper: Keeper | None = None,
) -> Distilled:
    """Train all scales and norms of a packed model end to end; the best state on held-out text is kept.

    The loss is the Kullback-Leibler divergence from the teacher's predictions to the model's. Training stops when the
    loss on the pieces held out no longer falls.

    Args:
        model: packed; changed in place.
        teacher: gives the dense model's logits (L, vocabulary) for a piece by its number.
        lessons: see `choose_lessons`.
        tuning: `steps` in all, rate and seed.
        on_step: told of (steps done, steps in all, loss of the last one).
        keeper: see `distill_model`.
    """
    model.requires_grad_(False)
    layers = _open_scales(model)
    trainer = Trainer(layers.values(), norm_weights(model), tuning)

    def loss(piece: int) -> Tensor:
        ids = lessons.pieces[piece : piece + 1].to(model.device)
        return divergence(teacher(piece).to(model.device), model(input_ids=ids, use_cache=False).logits[0])

    def measure() -> float:
        with torch.no_grad():
            return sum(float(loss(piece)) for piece in lessons.held_out) / len(lessons.held_out)

    best = trainer.run(lambda step: loss(lessons.train[step]), measure, FEWEST_STEPS, on_step, keeper)
    _close_scales(model, layers)
    return Distilled(best.before, best.loss, best.step)


def cut_pieces(windows: Tensor) -> Tensor:
    """Windows (N, L) cut to pieces of at most LENGTH tokens, (pieces, length).

    Raises:
        ModelError: they are fewer than three.
    """
    length = min(LENGTH, windows.shape[1])
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    if len(pieces) <= HELD_OUT:
        raise ModelError(
            f"distillation needs more than {HELD_OUT} pieces of {length} tokens; calibrate on more windows"
        )
    return pieces


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean over tokens of KL(wanted || found), in nats; of logits (L, vocabulary) both."""
    targets, predictions = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return nn.functional.kl_div(predictions, targets, log_target=True, reduction="batchmean")


def _move(model: PreTrainedModel, device: torch.device) -> None:
    """To a device, in evaluation mode, all but what is packed in the dtypes that it computes in."""
    model.to(device).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute_dtype(parameter.dtype, device))
    buffers = _plain_buffers(model)
    _put_back(model, {name: each.to(compute_dtype(each.dtype, device)) for name, each in buffers.items()})


def _put_back(model: PreTrainedModel, buffers: dict[str, Tensor]) -> None:
    """Make these the model's buffers again, by their names."""
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer


def _plain_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers of all but packed modules, such as rotary frequencies, by name."""
    return {
        f"{name}.{key}".removeprefix("."): buffer
        for name, module in model.named_modules()
        if not isinstance(module, PackedModule)
        for key, buffer in module.named_buffers(recurse=False)
    }


def _open_scales(model: PreTrainedModel) -> dict[str, TunableLinear]:
    """Put a `TunableLinear` in the place of every `BinaryLinear`."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    layers = {name: TunableLinear(module.matrix, module.bias, module.transposed) for name, module in packed.items()}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    return layers


def _close_scales(model: PreTrainedModel, layers: dict[str, TunableLinear]) -> None:
    """Pack the tuned scales again."""
    for name, layer in layers.items():
        replace_module(model, name, BinaryLinear.from_matrix(layer.to_matrix(), layer.bias, layer.transposed))
