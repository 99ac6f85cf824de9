"""Many methods on one model: quantize, evaluate, keep what each step gave, and go on where it stopped."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from arbllm.device import choose_device, evaluation_dtype
from arbllm.errors import ConfigError
from arbllm.evaluation.evaluate import evaluate
from arbllm.evaluation.methods import FULL, Recipe, find_recipe, is_known, make
from arbllm.evaluation.peers import check_library
from arbllm.evaluation.protocol import ROWS, SETTINGS, Protocol, merged_settings, shown_settings
from arbllm.evaluation.speed import tokens_per_second, write_samples
from arbllm.evaluation.tasks import TaskScore, averages, check_tasks
from arbllm.evaluation.written import write_json
from arbllm.model.perplexity import check_context, count_windows
from arbllm.model.source import open_config, open_model, open_tokenizer
from arbllm.progress import ProgressDisplay, RequestDisplay, WindowDisplay
from arbllm.text import evaluation_tokens

RESULTS, MODELS = "results.json", "models"
PIECE = 50  # windows of a text at a time, so that an interruption costs no more
Pieces = dict[str, list[tuple[int, int]]]


def compare(
    protocol: Protocol,
    methods: Sequence[str],
    out: Path,
    *,
    keep_models: bool = False,
    isolate: bool = True,
    on_step: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """Run what is missing of a comparison.

    `out` receives `rows/METHOD.json` as each step is done, and `results.json` with every row that is whole. A second
    run goes on where the first stopped, and may name other methods, more windows, texts, tasks or items.

    Args:
        protocol: what every method goes through.
        methods: names, see `arbllm.evaluation.methods`.
        out: a directory; made where it is not there.
        keep_models: keep the checkpoints in `out`/models; otherwise each is deleted once its row is whole.
        isolate: run every step in a process of its own, so that its peak memory is its own, too.
        on_step: told (method, step) as each step begins.

    Returns:
        What `results.json` holds: `settings`, `versions`, `machine`, and `rows`, a list in the order of the methods.

    Raises:
        ConfigError: a method is unknown, or `out` holds a comparison with other settings.
        ArbllmError: a step failed; what was done before is kept.
    """
    recipes = [find_recipe(name) for name in dict.fromkeys(methods)]
    if not recipes:
        raise ConfigError("no method is named; see arbllm compare --help")
    for recipe in recipes:
        if recipe.is_peer:
            check_library(recipe.name)
    check_tasks(protocol.tasks, Path(protocol.task_data) if protocol.task_data else None, protocol.limit)
    pieces = begin(protocol, out)
    for place, recipe in enumerate(recipes):
        run_row(recipe, protocol, pieces, out, isolate=isolate, on_step=on_step)
        if not keep_models:
            for name in _needed([recipe]) - _needed(recipes[place + 1 :]):
                shutil.rmtree(out / MODELS / name, ignore_errors=True)
        results = collect(protocol, pieces, out, [recipe.name for recipe in recipes])
        write_json(out / RESULTS, results)
    return results


def begin(protocol: Protocol, out: Path) -> Pieces:
    """Look at all that can be wrong with a protocol before any work is done, then make `out` and keep it there.

    Returns:
        See `text_pieces`.

    Raises:
        ConfigError: `out` holds rows that were made with other settings, or cannot be made.
        TextError: see `text_pieces`.
    """
    settings = merged_settings(protocol, out)
    pieces = text_pieces(protocol)
    try:
        (out / ROWS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error
    write_json(out / SETTINGS, settings)
    return pieces


def text_pieces(protocol: Protocol) -> Pieces:
    """For each text, (first window, window behind the last) of the pieces that it is evaluated in.

    Raises:
        TextError: a text cannot be read or holds no whole window, or `context` or `max_windows` is out of range.
        ModelError: the model cannot take so long a context.
    """
    check_context(open_config(protocol.model, protocol.calibration.trust_remote_code), protocol.context)
    tokenizer = open_tokenizer(protocol.model, protocol.calibration.trust_remote_code)
    pieces = {}
    for text in protocol.texts:
        windows = count_windows(evaluation_tokens(text, tokenizer), protocol.context, protocol.max_windows)
        pieces[text] = [(start, min(start + PIECE, windows)) for start in range(0, windows, PIECE)]
    return pieces


def collect(protocol: Protocol, pieces: Pieces, out: Path, methods: Sequence[str]) -> dict[str, Any]:
    """The rows that are whole; of methods not asked for now as well, behind the others."""
    files = {file.stem: file for file in sorted((out / ROWS).glob("*.json"))}
    order = [name for name in methods if name in files]
    order += [name for name in files if name not in methods and is_known(name)]  # ablations may lie there as well
    rows = []
    for name in order:
        recipe, done = find_recipe(name), read_row(files[name])
        if all(step.find(done) for step in _steps(recipe, protocol, pieces, out)):
            rows.append(_row(recipe, protocol, pieces, done))
    return {
        "settings": shown_settings(protocol),
        "versions": {name: version(name) for name in ("arbllm", "torch", "transformers")},
        "machine": f"{multiprocessing.cpu_count()} cores, {platform.machine()}",
        "rows": rows,
    }


def run_row(
    recipe: Recipe,
    protocol: Protocol,
    pieces: Pieces,
    out: Path,
    *,
    isolate: bool = True,
    speed: bool = True,
    on_step: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """Run the steps of one method that have not been done.

    Args:
        recipe: the method.
        protocol: what it goes through.
        pieces: see `text_pieces`.
        out: its steps are kept in `rows` under it, its checkpoint in `models`.
        isolate: see `compare`.
        speed: whether to measure speed and write samples, too.
        on_step: see `compare`.

    Returns:
        What each step gave: `quantize`, `texts` by text and piece, `tasks` by task and items, `speed`.
    """
    file = out / ROWS / f"{recipe.name}.json"
    done = read_row(file)
    steps = _steps(recipe, protocol, pieces, out, speed)
    if all(step.find(done) for step in steps):
        return done
    if recipe.name != FULL and not _is_made(recipe, out):
        done.pop("quantize", None)  # the model itself is needed for what is missing
    if recipe.base and "quantize" not in done:
        _make_base(recipe.base, protocol, out, isolate, on_step)
    for step in steps:
        if not step.find(done):
            if on_step:
                on_step(recipe.name, " ".join(step.path))
            result = _isolated(step.run, *step.arguments) if isolate else step.run(*step.arguments)
            step.keep(done, result)
            write_json(file, done)
    return done


def _make_base(
    base: Recipe, protocol: Protocol, out: Path, isolate: bool, on_step: Callable[[str, str], None] | None
) -> None:
    """Quantize what a distillation begins with, unless that is there; kept as the first step of its own row."""
    if not _is_made(base, out):
        file = out / ROWS / f"{base.name}.json"
        write_json(file, {key: value for key, value in read_row(file).items() if key != "quantize"})
    first = replace(protocol, texts=(), tasks=())
    run_row(base, first, {}, out, isolate=isolate, speed=False, on_step=on_step)


def _is_made(recipe: Recipe, out: Path) -> bool:
    return (out / MODELS / recipe.name / "config.json").exists()


def _needed(recipes: Sequence[Recipe]) -> set[str]:
    """The checkpoints that rows need."""
    return {each.name for recipe in recipes for each in (recipe, recipe.base) if each}


def read_row(file: Path) -> dict[str, Any]:
    """What the steps of a method have given so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@dataclass(frozen=True)
class _Step:
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


def _steps(recipe: Recipe, protocol: Protocol, pieces: Pieces, out: Path, speed: bool = True) -> list[_Step]:
    """The steps of a row in the order in which they run."""
    checkpoint = out / MODELS / recipe.name
    model = protocol.model if recipe.name == FULL else str(checkpoint)
    steps = [_Step(("quantize",), _quantize, (recipe, protocol, out))]
    for text in protocol.texts:
        steps += [_Step(("texts", Path(text).name, f"{start}-{stop}"), _read, (protocol, model, text, start, stop))
                  for start, stop in pieces[text]]  # fmt: skip
    steps += [_Step(("tasks", task, _items(protocol)), _ask, (protocol, model, task)) for task in protocol.tasks]
    return [*steps, _Step(("speed",), _speed, (protocol, model))] if speed else steps


def _items(protocol: Protocol) -> str:
    return "all" if protocol.limit is None else str(protocol.limit)


def _isolated(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result, from a process that begins and ends with it, and that ends when this one is stopped."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


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
    return made


def _read(protocol: Protocol, model: str, text: str, start: int, stop: int) -> dict[str, Any]:
    with WindowDisplay() as display:
        result = evaluate(
            model,
            (text,),
            context=protocol.context,
            skip_windows=start,
            max_windows=stop - start,
            on_window=display,
            **protocol.calibration.place(),
        )
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


def _row(recipe: Recipe, protocol: Protocol, pieces: Pieces, done: dict[str, Any]) -> dict[str, Any]:
    """One row of `results.json` from the steps of its method."""
    scores = [done["tasks"][task][_items(protocol)] for task in protocol.tasks]
    acc, acc_norm = averages(map(TaskScore.from_dict, scores)) if scores else (None, None)
    return {
        "method": recipe.name,
        "family": recipe.family,
        **done["quantize"],
        "perplexity": perplexities(protocol, pieces, done),
        "tasks": scores,
        "average_acc": acc,
        "average_acc_norm": acc_norm,
        **done["speed"],
    }


def perplexities(protocol: Protocol, pieces: Pieces, done: dict[str, Any]) -> dict[str, float]:
    """Perplexity over all pieces of each text, by the text's name."""
    found = {}
    for text in protocol.texts:
        name = Path(text).name
        found[name] = perplexity_of([done["texts"][name][f"{start}-{stop}"] for start, stop in pieces[text]])
    return found


def perplexity_of(parts: Sequence[dict[str, Any]]) -> float:
    """Perplexity of a text from those of its parts, with `windows` each; None counts as infinite."""
    windows = sum(part["windows"] for part in parts)
    return math.exp(sum(part["windows"] * math.log(part["perplexity"] or math.inf) for part in parts) / windows)
