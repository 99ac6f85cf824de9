"""Many methods on one model: quantize, evaluate, keep what each step gave, and go on where it stopped."""

from __future__ import annotations

import math
import multiprocessing
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arbllm.device import choose_device
from arbllm.errors import ConfigError
from arbllm.evaluation.methods import FULL, Recipe, find_recipe, is_known
from arbllm.evaluation.peers import check_library
from arbllm.evaluation.protocol import ROWS, SETTINGS, Protocol, merged_settings, shown_settings
from arbllm.evaluation.steps import MODELS, Pieces, isolated, items, read_row, steps_of
from arbllm.evaluation.tasks import TaskScore, averages, check_tasks
from arbllm.evaluation.written import write_json
from arbllm.model.perplexity import check_context, count_windows
from arbllm.model.quantize import check_length
from arbllm.model.source import check_dtype, open_config, open_tokenizer
from arbllm.text import calibration_windows, check_amount, evaluation_tokens

RESULTS = "results.json"
PIECE = 50  # windows of a text at a time, so that an interruption costs no more


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
    pieces = begin(protocol, out, calibrated=any(recipe.name != FULL for recipe in recipes))
    for place, recipe in enumerate(recipes):
        run_row(recipe, protocol, pieces, out, isolate=isolate, on_step=on_step)
        if not keep_models:
            for name in _needed([recipe]) - _needed(recipes[place + 1 :]):
                shutil.rmtree(out / MODELS / name, ignore_errors=True)
        results = collect(protocol, pieces, out, [recipe.name for recipe in recipes])
        write_json(out / RESULTS, results)
    return results


def begin(protocol: Protocol, out: Path, *, calibrated: bool = True, most_windows: int = 0) -> Pieces:
    """Look at all that can be wrong with a protocol before any work is done, then make `out` and keep it there.

    Args:
        protocol: what every method goes through.
        out: the directory of the comparison.
        calibrated: whether any method reads the calibration text.
        most_windows: windows of it that will be read at most, if more than the protocol's.

    Returns:
        See `text_pieces`.

    Raises:
        ConfigError: `out` holds rows that were made with other settings, or cannot be made; or the device or the dtype
            is unknown.
        TextError, ModelError: see `text_pieces` and `calibration_windows`.
    """
    settings = merged_settings(protocol, out)
    choose_device(protocol.calibration.device)
    check_dtype(protocol.calibration.dtype)
    pieces = text_pieces(protocol)
    if calibrated:
        check_calibration(protocol, most_windows)
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


def check_calibration(protocol: Protocol, most_windows: int = 0) -> None:
    """See that the calibration text has the windows that will be asked of it, `most_windows` if that is more.

    Raises:
        TextError: it cannot be read, or is too short; or a number of windows is out of range.
        ModelError: the model cannot take windows of that length.
    """
    text = protocol.calibration
    check_length(open_config(protocol.model, text.trust_remote_code), text.window_length)
    asked = text.windows, text.windows if text.distill_windows is None else text.distill_windows
    check_amount(min(asked), text.window_length)
    tokenizer = open_tokenizer(protocol.model, text.trust_remote_code)
    calibration_windows(text.text, tokenizer, max(*asked, most_windows), text.window_length, text.seed)


def collect(protocol: Protocol, pieces: Pieces, out: Path, methods: Sequence[str]) -> dict[str, Any]:
    """The rows that are whole; of methods not asked for now as well, behind the others."""
    files = {file.stem: file for file in sorted((out / ROWS).glob("*.json"))}
    order = [name for name in methods if name in files]
    order += [name for name in files if name not in methods and is_known(name)]  # ablations may lie there as well
    rows = []
    for name in order:
        recipe, done = find_recipe(name), read_row(files[name])
        if all(step.find(done) for step in steps_of(recipe, protocol, pieces, out)):
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
    checkpoint: bool = False,
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
        checkpoint: whether its checkpoint is to be there in the end, even if all steps were done.
        on_step: see `compare`.

    Returns:
        What each step gave: `quantize`, `texts` by text and piece, `tasks` by task and items, `speed`.
    """
    file = out / ROWS / f"{recipe.name}.json"
    done = read_row(file)
    steps = steps_of(recipe, protocol, pieces, out, speed)
    if all(step.find(done) for step in steps) and not (checkpoint and not _is_made(recipe, out)):
        return done
    before: dict[str, Any] = {}
    if recipe.name != FULL and not _is_made(recipe, out):
        before = done.pop("quantize", {})  # the model itself is needed for what is missing
    if recipe.base and "quantize" not in done:
        first = replace(protocol, texts=(), tasks=())
        run_row(recipe.base, first, {}, out, isolate=isolate, speed=False, on_step=on_step, checkpoint=True)
    for step in steps:
        if not step.find(done):
            if on_step:
                on_step(recipe.name, " ".join(step.path))
            result = isolated(step.run, *step.arguments) if isolate else step.run(*step.arguments)
            if before and before.get("checkpoint") != result.get("checkpoint"):
                done = {}  # what the one before it gave is of another checkpoint: processors round differently
            before = {}
            step.keep(done, result)
            write_json(file, done)
    return done


def _is_made(recipe: Recipe, out: Path) -> bool:
    return (out / MODELS / recipe.name / "config.json").exists()


def _needed(recipes: Sequence[Recipe]) -> set[str]:
    """The checkpoints that rows need."""
    return {each.name for recipe in recipes for each in (recipe, recipe.base) if each}


def _row(recipe: Recipe, protocol: Protocol, pieces: Pieces, done: dict[str, Any]) -> dict[str, Any]:
    """One row of `results.json` from the steps of its method."""
    scores = [done["tasks"][task][items(protocol)] for task in protocol.tasks]
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
