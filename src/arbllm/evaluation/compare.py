"""Many methods on one model: quantize, evaluate, keep what each step gave, and go on where it stopped."""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arbllm.device import choose_device, evaluation_dtype
from arbllm.errors import ConfigError
from arbllm.evaluation.evaluate import evaluate
from arbllm.evaluation.methods import FULL, Calibration, Recipe, find_recipe, make
from arbllm.evaluation.speed import tokens_per_second, write_samples
from arbllm.evaluation.tasks import check_tasks
from arbllm.model.source import open_model
from arbllm.progress import ProgressDisplay, RequestDisplay, WindowDisplay

SETTINGS, RESULTS, ROWS, MODELS = "settings.json", "results.json", "rows", "models"
Step = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Protocol:
    """What every method of a comparison goes through.

    Attributes:
        model: a hub id, a local directory or a `.gguf` file.
        calibration: see `Calibration`.
        texts: perplexity is measured on each; see `arbllm.evaluation.evaluate.evaluate`, as for the rest.
        context: tokens of a window.
        max_windows: windows of each text at most; None for all.
        tasks: zero-shot tasks.
        task_data: the folder with their raw data sets; None takes them from the hub.
        limit: items of each task at most; None for all.
    """

    model: str
    calibration: Calibration = field(default_factory=Calibration)
    texts: tuple[str, ...] = ("wikitext2",)
    context: int = 2048
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None


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

    `out` receives `rows/METHOD.json` as each step is done, and `results.json` with every row that there is. A second
    run with the same settings goes on where the first stopped, and may name other methods.

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
    check_tasks(protocol.tasks, Path(protocol.task_data) if protocol.task_data else None, protocol.limit)
    (out / ROWS).mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(protocol)))
    check_settings(out / SETTINGS, settings)
    for recipe in recipes:
        run_row(recipe, protocol, out, isolate=isolate, on_step=on_step)
        if not keep_models:
            shutil.rmtree(out / MODELS / recipe.name, ignore_errors=True)
        results = collect(out, [recipe.name for recipe in recipes])
        write_json(out / RESULTS, results)
    return results


def collect(out: Path, methods: Sequence[str]) -> dict[str, Any]:
    """The rows that are whole; of methods not asked for now as well, behind the others."""
    files = {file.stem: file for file in sorted((out / ROWS).glob("*.json"))}
    order = [name for name in methods if name in files] + [name for name in files if name not in methods]
    rows = []
    for name in order:
        steps = json.loads(files[name].read_text(encoding="utf-8"))
        if "speed" in steps:
            rows.append(_row(find_recipe(name), steps))
    return {
        "settings": shown_settings(out),
        "versions": {name: version(name) for name in ("arbllm", "torch", "transformers")},
        "machine": f"{multiprocessing.cpu_count()} cores, {platform.machine()}",
        "rows": rows,
    }


def run_row(
    recipe: Recipe,
    protocol: Protocol,
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
        out: its steps are kept in `rows` under it, its checkpoint in `models`.
        isolate: see `compare`.
        speed: whether to measure speed and write samples, too.
        on_step: see `compare`.

    Returns:
        What each step gave, by its name.
    """
    file = out / ROWS / f"{recipe.name}.json"
    done = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    checkpoint = out / MODELS / recipe.name
    model = protocol.model if recipe.name == FULL else str(checkpoint)
    steps: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
        "quantize": (_quantize, (recipe, protocol, checkpoint)),
        **{f"text {text}": (_evaluate, (protocol, model, (text,), ())) for text in protocol.texts},
        **({"tasks": (_evaluate, (protocol, model, (), protocol.tasks))} if protocol.tasks else {}),
        **({"speed": (_speed, (protocol, model))} if speed else {}),
    }
    if all(step in done for step in steps):
        return done
    if recipe.name != FULL and not (checkpoint / "config.json").exists():
        done.pop("quantize", None)  # the model itself is needed for what is missing
    for step, (function, arguments) in steps.items():
        if step not in done:
            if on_step:
                on_step(recipe.name, step)
            done[step] = _isolated(function, *arguments) if isolate else function(*arguments)
            write_json(file, done)
    return done


def _isolated(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's result, from a process that begins and ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _quantize(recipe: Recipe, protocol: Protocol, checkpoint: Path) -> dict[str, Any]:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with ProgressDisplay() as display:
        return make(recipe, protocol.model, checkpoint, protocol.calibration, display)


def _evaluate(protocol: Protocol, model: str, texts: tuple[str, ...], tasks: tuple[str, ...]) -> dict[str, Any]:
    with WindowDisplay() as windows, RequestDisplay() as requests:
        result = evaluate(
            model,
            texts,
            context=protocol.context,
            max_windows=protocol.max_windows,
            tasks=tasks,
            task_data=Path(protocol.task_data) if protocol.task_data else None,
            limit=protocol.limit,
            device=protocol.calibration.device,
            dtype=protocol.calibration.dtype,
            trust_remote_code=protocol.calibration.trust_remote_code,
            on_window=windows,
            on_request=requests,
        )
    return result.to_dict()


def _speed(protocol: Protocol, model: str) -> dict[str, Any]:
    place = choose_device(protocol.calibration.device)
    dtype = evaluation_dtype(protocol.calibration.dtype, place)
    opened, tokenizer = open_model(model, dtype, place, protocol.calibration.trust_remote_code)
    samples = [asdict(sample) for sample in write_samples(opened, tokenizer)]
    return {"tokens_per_second": tokens_per_second(opened, tokenizer), "samples": samples}


def _row(recipe: Recipe, steps: dict[str, Any]) -> dict[str, Any]:
    """One row of `results.json` from the steps of its method."""
    texts = {
        step.removeprefix("text "): figures["perplexity"] for step, figures in steps.items() if step[:5] == "text "
    }
    tasks = steps.get("tasks", {})
    return {
        "method": recipe.name,
        "family": recipe.family,
        **steps["quantize"],
        "perplexity": {Path(text).name: value for text, value in texts.items()},
        "tasks": tasks.get("tasks", []),
        "average_acc": tasks.get("average_acc"),
        "average_acc_norm": tasks.get("average_acc_norm"),
        **steps["speed"],
    }


def shown_settings(out: Path) -> dict[str, Any]:
    """The settings of a comparison with files by their names alone, to be shown elsewhere."""
    settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    settings |= {"model": Path(settings["model"]).name, "texts": [Path(text).name for text in settings["texts"]]}
    settings["calibration"] |= {"text": Path(settings["calibration"]["text"]).name}
    return {key: value for key, value in settings.items() if key != "task_data"}


def check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a comparison, or refuse others than those that it was begun with."""
    if not file.exists():
        write_json(file, settings)
        return
    begun = json.loads(file.read_text(encoding="utf-8"))
    for name in settings:
        if begun.get(name) != settings[name]:
            raise ConfigError(
                f"{file.parent} holds a comparison with other settings ({name} was {begun.get(name)}, not "
                f"{settings[name]}); choose another --out, or the same settings"
            )


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write JSON so that an interruption leaves the old file or the new one."""
    text = json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _finite(value: Any) -> Any:
    """The value with null in place of numbers that JSON cannot hold, such as the perplexity of a collapsed model."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
