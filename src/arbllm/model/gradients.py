"""Gradients of the model's loss at the outputs of its linears, one block's activations in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from arbllm.model.capture import BlockCall, intercepted, resident
from arbllm.model.head import Head, split_head, tokens_at_a_time
from arbllm.model.walk import DecoderBlock, Linear

Watch = Callable[[Linear, Tensor, Tensor], None]


def watch_gradients(
    model: PreTrainedModel, blocks: Sequence[DecoderBlock], windows: Tensor, device: torch.device, watch: Watch
) -> None:
    """Run text forward and its loss, the summed cross entropy of the next token, backward through a dense model.

    Blocks keep their inputs alone and run again when gradients come back, so that a window takes little more memory
    than its hidden states between blocks and what one block needs. Logits come in pieces where the model allows it.

    Args:
        model: computes on `device` as a whole and is put back afterwards.
        blocks: its decoder blocks.
        windows: token windows, int64 (N, L), one backward pass each.
        device: where to compute.
        watch: is called as watch(linear, value, gradient) for every linear and window with the linear's output and the
            loss's gradient there, both (1, L - 1, n): the last token predicts nothing.
    """
    model.eval()
    with resident(model, device), _frozen(model), ExitStack() as stack:
        head = split_head(model)
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
        stack.callback(hook.remove)
        stack.enter_context(intercepted(blocks, _run_again_in_backward))
        for block in blocks:
            for linear in block.linears:
                stack.callback(linear.module.register_forward_hook(partial(_attach, watch, linear)).remove)
        for window in windows.to(device):
            _backward(model, head, window)


def _attach(watch: Watch, linear: Linear, _: nn.Module, __: Any, output: Tensor) -> None:
    if output.requires_grad:  # else it runs without a graph, to be run again
        output.register_hook(partial(watch, linear, output.detach()))


def _run_again_in_backward(_: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    hidden, call = BlockCall.split(args, kwargs)
    return checkpoint(partial(call.put, forward), hidden, use_reentrant=True, preserve_rng_state=False)


def _backward(model: PreTrainedModel, head: Head | None, window: Tensor) -> None:
    """One window (L,) forward and backward."""
    inputs, targets = window[None, :-1], window[1:]
    if head is None:
        _loss(model(input_ids=inputs, use_cache=False).logits, targets).backward()
        return
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    states = hidden.detach().requires_grad_()
    piece = tokens_at_a_time(model)
    for start in range(0, targets.numel(), piece):
        _loss(head(states[:, start : start + piece]), targets[start : start + piece]).backward()
    hidden.backward(states.grad)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter collects gradients inside; they flow through activations alone."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
