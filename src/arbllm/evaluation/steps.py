"""The steps of a row of a comparison: quantize, read texts, answer tasks, write; each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from arbllm.device import choose_device, evaluation_dtype
from arbllm.errors import ArbllmError, ConfigError
from arbllm.evaluation.evaluate import evaluate
from arbllm.evaluation.methods import FULL, Recipe, make
from arbllm.evaluation.protocol import ROWS, Protocol
from arbllm.evaluation.speed import tokens_per_second, write_samples
from arbllm.model.perplexity import NotFiniteError
from arbllm.model.source import open_model
from arbllm.progress import ProgressDisplay, RequestDisplay, WindowDisplay

MODELS = "models"
WEIGHTS = "*.safetensors"
Pieces = dict[str, list[tuple[int, int]]]
"""For each text, (first window, window behind the last) of the pieces that it is evaluated in."""


def read_row(file: Path) -> dict[str, Any]:
    """What the steps of a method have given so far.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{file}: not readable ({error}); delete it, and its steps are done again") from error


@dataclass(frozen=True)
class Step:
    """One step of a row: where its result is kept, and what gives it."""

    path: tuple[str, ...]
    run: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]

    def find(self, done: dict[str, Any]) -> dict[str, Any]:
        """Its result among those of a row; empty if there is none."""
        for key in self.path:
            done = done.get(key, {})
        return done

    def keep(self, done: dict[str, Any], result: dict[str, Any]) -> None:
        """Put its result among those of a row."""
        *folders, name = self.path
        for key in folders:
            done = done.setdefault(key, {})
        done[name] = result


def steps_of(recipe: Recipe, protocol: Protocol, pieces: Pieces, out: Path, speed: bool = True) -> list[Step]:
    """The steps of a row in the order in which they run."""
    checkpoint = out / MODELS / recipe.name
    model = protocol.model if recipe.name == FULL else str(checkpoint)
    steps = [Step(("quantize",), _quantize, (recipe, protocol, out))]
    for text in protocol.texts:
        steps += [Step(("texts", Path(text).name, f"{start}-{stop}"), _read, (protocol, model, text, start, stop))
                  for start, stop in pieces[text]]  # fmt: skip
    steps += [Step(("tasks", task, items(protocol)), _ask, (protocol, model, task)) for task in protocol.tasks]
    return [*steps, Step(("speed",), _speed, (protocol, model))] if speed else steps


def items(protocol: Protocol) -> str:
    """How many items of a task a protocol asks for, as rows name it."""
    return "all" if protocol.limit is None else str(protocol.limit)


def isolated(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result, from a process that begins and ends with it, and that ends when this one is stopped.

    Raises:
        ArbllmError: the system ended that process.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        except BrokenProcessPool as error:
            raise ArbllmError(
                "the process of this step was ended from outside, probably for lack of memory; what was done is kept: "
                "give the same command again with more memory free, or with fewer or shorter windows into another --out"
            ) from error


def _end_with_parent() -> None:
    """End this process as soon as the one that began it is gone, in whatever way that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was begun by another"

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _quantize(recipe: Recipe, protocol: Protocol, out: Path) -> dict[str, Any]:
    checkpoint = out / MODELS / recipe.name
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with ProgressDisplay() as display:
        made = make(recipe, protocol.model, checkpoint, protocol.calibration, display)
    if recipe.base:  # what it took from the beginning
        before = read_row(out / ROWS / f"{recipe.base.name}.json")["quantize"]
        made["seconds"] += before["seconds"]
        made["peak_memory_bytes"] = max(made["peak_memory_bytes"], before["peak_memory_bytes"])
    return made if recipe.name == FULL else made | {"checkpoint": _digest(checkpoint)}


def _digest(checkpoint: Path) -> str:
    """Checksum of the weight files: whether a checkpoint made anew is the one that steps were done with."""
    total = sha256()
    for file in sorted(checkpoint.glob(WEIGHTS)):
        with file.open("rb") as stream:
            total.update(file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _read(protocol: Protocol, model: str, text: str, start: int, stop: int) -> dict[str, Any]:
    options: dict[str, Any] = {"context": protocol.context, "skip_windows": start, "max_windows": stop - start}
    try:
        with WindowDisplay() as display:
            result = evaluate(model, (text,), on_window=display, **options, **protocol.calibration.place())
    except NotFiniteError:  # a collapsed model has a row as well
        return {"perplexity": None, "windows": stop - start}
    return {
        "perplexity": result.texts[text].perplexity,
        "windows": result.texts[text].windows,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def _ask(protocol: Protocol, model: str, task: str) -> dict[str, Any]:
    with RequestDisplay() as display:
        result = evaluate(
            model,
            (),
            tasks=(task,),
            task_data=Path(protocol.task_data) if protocol.task_data else None,
            limit=protocol.limit,
            on_request=display,
            **protocol.calibration.place(),
        )
    return result.tasks[0].to_dict()


def _speed(protocol: Protocol, model: str) -> dict[str, Any]:
    place = choose_device(protocol.calibration.device)
    dtype = evaluation_dtype(protocol.calibration.dtype, place)
    opened, tokenizer = open_model(model, dtype, place, protocol.calibration.trust_remote_code)
    samples = [asdict(sample) for sample in write_samples(opened, tokenizer)]
    return {"tokens_per_second": tokens_per_second(opened, tokenizer), "samples": samples}
