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
from arbllm.model.events import DistillationFinished, DistillationStep, OnEvent
from arbllm.model.tune import Trainer, Tuning, norm_weights
from arbllm.model.walk import replace_module
from arbllm.nn import BinaryLinear, PackedModule
from arbllm.tunable import TunableLinear

FEWEST_STEPS = 8  # between two measurements of the held-out loss
HELD_OUT = 2
LENGTH = 512
DISTILLATION_RATE = 4e-3


class Distilled(NamedTuple):
    """The mean divergence of the packed model's predictions on held-out text, in nats a token, and the steps kept."""

    before: float
    after: float
    steps: int


def distill_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    tuning: Tuning,
    device: torch.device,
    emit: OnEvent,
) -> None:
    """Distil on a device, in the dtype that it computes in, and put the model back as it was.

    Args:
        model: packed, as `quantize_model` leaves it; changed in place.
        teacher: the dense model; moved.
        windows: text, int64 (N, L).
        tuning: steps in all, rate and seed.
        device: where to compute.
        emit: told of every step and of the end.
    """
    start, home, dtype = time.perf_counter(), model.device, model.dtype
    kept = _plain_buffers(model)
    for each in (model, teacher):
        each.to(device, compute_dtype(each.dtype, device)).eval()
    result = distill(model, teacher, windows, tuning, lambda *step: emit(DistillationStep(*step)))
    model.to(home, dtype)
    for name, buffer in kept.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = buffer
    emit(DistillationFinished(*result, seconds=time.perf_counter() - start))


def distill(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Tensor,
    tuning: Tuning,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Distilled:
    """Train all scales and norms of a packed model end to end; the best state on held-out text is kept.

    The loss is the Kullback-Leibler divergence from the teacher's predictions to the model's. Windows are cut to pieces
    of at most LENGTH tokens, one a step; the last two pieces are held out, and training stops when the loss there no
    longer falls.

    Args:
        model: packed; changed in place.
        teacher: the dense model, in evaluation mode.
        windows: text, int64 (N, L).
        tuning: `steps` in all, rate and seed.
        on_step: told of (steps done, steps in all, loss of the last one).

    Raises:
        ModelError: fewer than three pieces of text.
    """
    pieces = cut_pieces(windows)
    train, held_out = pieces[:-HELD_OUT], pieces[-HELD_OUT:]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(tuning.seed)).tolist()
    model.requires_grad_(False)
    layers = _open_scales(model)
    trainer = Trainer(layers.values(), norm_weights(model), tuning)

    def measure() -> float:
        with torch.no_grad():
            return sum(float(divergence(model, teacher, piece[None])) for piece in held_out) / len(held_out)

    def loss(step: int) -> Tensor:
        return divergence(model, teacher, train[order[step % len(train)]][None])

    best = trainer.run(loss, measure, FEWEST_STEPS, on_step)
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


def divergence(model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || model), in nats.

    Args:
        model: what is trained.
        teacher: what it shall predict like.
        ids: tokens, int64 (1, L).
    """
    ids = ids.to(model.device)
    with torch.no_grad():
        wanted = teacher(input_ids=ids.to(teacher.device), use_cache=False).logits[0].float().log_softmax(-1)
    found = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return nn.functional.kl_div(found, wanted.to(found.device), log_target=True, reduction="batchmean")


def _plain_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Buffers of all but packed modules, such as rotary frequencies, which stay float32 in half-precision models."""
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
