"""Perplexity by the protocol that quantization papers share: one long text, cut into windows that do not overlap."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from arbllm.errors import ModelError, TextError
from arbllm.model.head import Head, split_head, tokens_at_a_time

DEFAULT_CONTEXT = 2048


class NotFiniteError(ModelError):
    """The model's logits are not finite: it has collapsed, or its dtype cannot hold them."""


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity.

    Attributes:
        perplexity: exp of the mean negative log likelihood over all predicted tokens.
        windows: windows evaluated.
        context: tokens of a window; all but the first are predicted.
        seconds: wall-clock time.
    """

    perplexity: float
    windows: int
    context: int
    seconds: float


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    context: int = DEFAULT_CONTEXT,
    *,
    max_windows: int | None = None,
    skip_windows: int = 0,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a tokenised text.

    The text is cut into windows of `context` tokens, the incomplete last one is dropped, and each window is predicted
    on its own: from its first token alone up to all but its last. The logits of a window are computed in pieces of the
    sequence where the model allows it (see `split_head`), since 2048 x 128k float32 logits are a gigabyte.

    Args:
        model: any Hugging Face causal LM, dense or packed, in its evaluation dtype and on its device.
        tokens: int64 (T,), the whole text tokenised once.
        context: tokens of a window, at least 2.
        max_windows: stop after this many windows; None for all.
        skip_windows: leave out this many windows at the start, for a text evaluated in pieces.
        on_window: called after each window with (windows done, windows in all, perplexity so far).

    Raises:
        TextError: the text holds no whole window, or `context` or a number of windows is out of range.
        ModelError: the model cannot take so long a context.
        NotFiniteError: its logits are not finite.
    """
    windows = cut_windows(model, tokens, context, max_windows, skip_windows)
    start = time.perf_counter()
    model.eval()
    head = split_head(model)
    total = 0.0
    for done, window in enumerate(windows, start=1):
        total += negative_log_likelihood(model, window.to(model.device), head)
        if not math.isfinite(total):
            raise NotFiniteError(
                f"the model's logits are not finite (window {done}); if this was not float32 or bfloat16, try that"
            )
        if on_window:
            on_window(done, len(windows), _exp(total / (done * (context - 1))))
    mean = total / (len(windows) * (context - 1))
    return Perplexity(_exp(mean), len(windows), context, time.perf_counter() - start)


def negative_log_likelihood(model: PreTrainedModel, window: Tensor, head: Head | None = None) -> float:
    """Summed negative log likelihood, in nats, of the tokens of `window` after its first.

    Args:
        model: a causal LM.
        window: int64 (L,) on the model's device.
        head: turns the decoder's hidden states (1, l, d) into logits (1, l, V); None lets the model do all at once.
    """
    inputs, targets = window[None, :-1], window[1:]
    if head is None:
        logits = model(input_ids=inputs, use_cache=False).logits[0]
        return _cross_entropy(logits, targets)
    hidden = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    piece = tokens_at_a_time(model)
    return sum(
        _cross_entropy(head(hidden[:, start : start + piece])[0], targets[start : start + piece])
        for start in range(0, targets.numel(), piece)
    )


def cut_windows(
    model: PreTrainedModel, tokens: Tensor, context: int, max_windows: int | None = None, skip_windows: int = 0
) -> Tensor:
    """Cut a text into windows that do not overlap, after checking that the model can be evaluated on them.

    Args:
        model: the model to evaluate.
        tokens: int64 (T,).
        context: tokens of a window.
        max_windows: windows at most; None for all.
        skip_windows: windows left out at the start.

    Returns:
        int64 (N, context).

    Raises:
        TextError, ModelError: see `perplexity`.
    """
    count_windows(tokens, context, max_windows)
    count = tokens.numel() // context
    check_context(model.config, context)
    if not 0 <= skip_windows < count:
        raise TextError(f"skip-windows must be from 0 to {count - 1}, since the text has {count} windows")
    return tokens[: count * context].view(count, context)[skip_windows:][:max_windows]


def count_windows(tokens: Tensor, context: int, max_windows: int | None = None) -> int:
    """How many windows of `context` tokens a text (T,) is cut into, `max_windows` at most.

    Raises:
        TextError: none, or `context` or `max_windows` is out of range.
    """
    if context < 2:
        raise TextError(f"a context of {context} tokens predicts nothing; it must be at least 2")
    if max_windows is not None and max_windows < 1:
        raise TextError(f"max-windows must be at least 1, not {max_windows}")
    count = tokens.numel() // context
    if count == 0:
        raise TextError(
            f"the text has {tokens.numel()} tokens, less than one window of {context}; choose a longer text, or, where "
            "it can be chosen, a shorter --context"
        )
    return min(count, max_windows or count)


def check_context(config: PretrainedConfig, context: int) -> None:
    """Refuse windows of more tokens than a model takes.

    Raises:
        ModelError: it says that it takes fewer.
    """
    if context > (longest := longest_context(config, context)):
        raise ModelError(f"the model takes at most {longest} tokens at once; choose --context {longest} or less")


def longest_context(config: PretrainedConfig, otherwise: int = DEFAULT_CONTEXT) -> int:
    """Tokens that a model takes at once, or `otherwise` where it does not tell."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or otherwise


def _cross_entropy(logits: Tensor, targets: Tensor) -> float:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()


def _exp(mean: float) -> float:
    """exp, infinite instead of an OverflowError for a model that has collapsed."""
    return math.exp(mean) if mean < 700 else math.inf
