"""A model by name, and what it scores: everything that `arbllm eval` reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arbllm.device import choose_device, evaluation_dtype
from arbllm.evaluation.measure import measure
from arbllm.evaluation.perplexity import perplexity
from arbllm.format.checkpoint import bytes_on_disk
from arbllm.integrations.transformers import stored_size
from arbllm.model.source import open_model
from arbllm.text import evaluation_tokens


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model on one text.

    Attributes:
        model: the model, as named.
        text: the text, as named.
        perplexity: see `arbllm.evaluation.perplexity`.
        windows: windows evaluated.
        context: tokens of a window.
        true_bits_per_weight: stored bits a weight of the packed linears; None for a dense model.
        nominal_bits_per_weight: signs a weight of them; None for a dense model.
        bytes_on_disk: size of the model's files; None for a model on the hub.
        seconds: wall-clock time, loading included.
        peak_memory_bytes: greatest resident memory of the process.
        peak_device_memory_bytes: greatest memory of tensors on the GPU; None without one.
    """

    model: str
    text: str
    perplexity: float
    windows: int
    context: int
    true_bits_per_weight: float | None
    nominal_bits_per_weight: float | None
    bytes_on_disk: int | None
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those that do not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def evaluate(
    model: str,
    text: str = "wikitext2",
    *,
    context: int = 2048,
    max_windows: int | None = None,
    skip_windows: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Perplexity of a model, dense or packed, with its size and cost.

    Args:
        model: a hub id, a local directory or a `.gguf` file.
        text: wikitext2, ptb, c4, a text file, or `builtin`.
        context: tokens of a window.
        max_windows: windows evaluated at most; None for all.
        skip_windows: windows left out at the start of the text.
        device: see `choose_device`.
        dtype: `auto` is float32 on a CPU and the stored dtype on a GPU.
        trust_remote_code: run model code that comes with the checkpoint.
        on_window: see `perplexity`.

    Raises:
        ArbllmError: the model or the text cannot be used; the message says why.
    """
    place = choose_device(device)
    with measure() as measured:
        opened, tokenizer = open_model(
            model, dtype=evaluation_dtype(dtype, place), device=place, trust_remote_code=trust_remote_code
        )
        tokens = evaluation_tokens(text, tokenizer)
        result = perplexity(
            opened, tokens, context, max_windows=max_windows, skip_windows=skip_windows, on_window=on_window
        )
    size = stored_size(opened)
    return Evaluation(
        model=model,
        text=text,
        perplexity=result.perplexity,
        windows=result.windows,
        context=context,
        true_bits_per_weight=size.true_bits or None,
        nominal_bits_per_weight=size.nominal_bits or None,
        bytes_on_disk=bytes_on_disk(Path(model)) if Path(model).exists() else None,
        seconds=measured.seconds,
        peak_memory_bytes=measured.peak_memory_bytes,
        peak_device_memory_bytes=measured.peak_device_memory_bytes,
    )
