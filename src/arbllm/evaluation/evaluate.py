"""A model by name, and what it scores: everything that `arbllm eval` reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arbllm.device import choose_device, evaluation_dtype
from arbllm.errors import ConfigError
from arbllm.evaluation.tasks import TaskScore, averages, check_tasks, evaluate_tasks
from arbllm.format.checkpoint import bytes_on_disk
from arbllm.integrations.transformers import stored_size
from arbllm.measure import measure
from arbllm.model.perplexity import Perplexity, cut_windows, perplexity
from arbllm.model.source import open_model
from arbllm.text import evaluation_tokens


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model.

    Attributes:
        model: the model, as named.
        texts: perplexity by text, as named, in the order asked for.
        tasks: scores of tasks, in the order asked for.
        true_bits_per_weight: stored bits a weight of the packed linears; None for a dense model.
        nominal_bits_per_weight: signs a weight of them; None for a dense model.
        bytes_on_disk: size of the model's files; None for a model on the hub.
        seconds: wall-clock time, loading included.
        peak_memory_bytes: greatest resident memory of the process.
        peak_device_memory_bytes: greatest memory of tensors on the GPU; None without one.
    """

    model: str
    texts: dict[str, Perplexity]
    tasks: list[TaskScore]
    true_bits_per_weight: float | None
    nominal_bits_per_weight: float | None
    bytes_on_disk: int | None
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those that do not apply; the figures of a single text at the top, too."""
        values: dict[str, Any] = {"model": self.model}
        texts = {name: {"perplexity": p.perplexity, "windows": p.windows, "context": p.context}
                 for name, p in self.texts.items()}  # fmt: skip
        if len(texts) == 1:
            [(name, figures)] = texts.items()
            values |= {"text": name, **figures}
        values["texts"] = texts
        if self.tasks:
            acc, acc_norm = averages(self.tasks)
            values["tasks"] = [score.to_dict() for score in self.tasks]
            values |= {"average_acc": acc, "average_acc_norm": acc_norm}
        names = ("true_bits_per_weight", "nominal_bits_per_weight", "bytes_on_disk", "seconds", "peak_memory_bytes")
        values |= {name: getattr(self, name) for name in (*names, "peak_device_memory_bytes")}
        return {key: value for key, value in values.items() if value is not None}


def evaluate(
    model: str,
    texts: Sequence[str] = ("wikitext2",),
    *,
    context: int = 2048,
    max_windows: int | None = None,
    skip_windows: int = 0,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    limit: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    on_window: Callable[[int, int, float], None] | None = None,
    on_request: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity and task scores of a model, dense or packed, with its size and cost.

    Args:
        model: a hub id, a local directory or a `.gguf` file.
        texts: each of them wikitext2, ptb, c4, a text file, or `builtin`.
        context: tokens of a window.
        max_windows: windows of each text evaluated at most; None for all.
        skip_windows: windows left out at the start of each text.
        tasks: zero-shot tasks, see `evaluate_tasks`.
        task_data: the folder with their raw data sets; None takes them from the hub.
        limit: items of each task at most; None for all.
        device: see `choose_device`.
        dtype: `auto` is float32 on a CPU and the stored dtype on a GPU.
        trust_remote_code: run model code that comes with the checkpoint.
        on_window: see `perplexity`.
        on_request: see `evaluate_tasks`.

    Raises:
        ArbllmError: the model, a text or a task cannot be used; the message says why.
    """
    place = choose_device(device)
    if not texts and not tasks:
        raise ConfigError("nothing to evaluate: name a text or a task")
    if not texts and (skip_windows or max_windows is not None):
        raise ConfigError("skip_windows and max_windows are for texts; name one, or leave these options out")
    texts, tasks = list(dict.fromkeys(texts)), list(dict.fromkeys(tasks))
    task_data = task_data and task_data.expanduser()
    check_tasks(tasks, task_data, limit)
    with measure() as measured:
        opened, tokenizer = open_model(
            model, dtype=evaluation_dtype(dtype, place), device=place, trust_remote_code=trust_remote_code
        )
        tokens = {text: evaluation_tokens(text, tokenizer) for text in texts}
        for text in texts:  # before the hours that the first of them may take
            cut_windows(opened, tokens[text], context, max_windows, skip_windows)
        results = {
            text: perplexity(
                opened, tokens[text], context, max_windows=max_windows, skip_windows=skip_windows, on_window=on_window
            )
            for text in texts
        }
        scores = []
        if tasks:
            scores = evaluate_tasks(opened, tokenizer, tasks, data=task_data, limit=limit, on_request=on_request)
    size = stored_size(opened)
    return Evaluation(
        model=model,
        texts=results,
        tasks=scores,
        true_bits_per_weight=size.true_bits or None,
        nominal_bits_per_weight=size.nominal_bits or None,
        bytes_on_disk=bytes_on_disk(Path(model)) if Path(model).expanduser().exists() else None,
        seconds=measured.seconds,
        peak_memory_bytes=measured.peak_memory_bytes,
        peak_device_memory_bytes=measured.peak_device_memory_bytes,
    )
