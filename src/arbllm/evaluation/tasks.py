"""Zero-shot question answering through lm-evaluation-harness, from the hub or from files at hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arbllm.errors import ConfigError, TextError
from arbllm.hub import hub_is_reachable, is_offline_by_choice
from arbllm.integrations.lm_eval import check_harness, check_names, run_harness
from arbllm.model.likelihood import log_likelihoods

TASKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")


@dataclass(frozen=True)
class TaskScore:
    """The score on one task.

    Attributes:
        task: its name.
        items: items answered.
        acc: share of items where the right answer is the likeliest.
        acc_stderr: its standard error; None of a single item.
        acc_norm: the same with log likelihoods divided by the answers' lengths in bytes; None where a task has none.
        acc_norm_stderr: its standard error.
    """

    task: str
    items: int
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those that do not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskScore:
        """The score that `to_dict` made these values from."""
        return cls(**{"acc_stderr": None, "acc_norm": None, "acc_norm_stderr": None} | values)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    on_request: Callable[[int, int], None] | None = None,
) -> list[TaskScore]:
    """Score a model on tasks, zero-shot.

    Args:
        model: a causal LM, dense or packed, in its evaluation dtype and on its device.
        tokenizer: its tokenizer.
        tasks: names of tasks, with `data` those of `TASKS`, otherwise any multiple-choice task of the harness.
        data: a folder with the raw data sets (see docs/commands.md); None takes them from the hub.
        limit: items of each task at most, from its beginning; None for all.
        on_request: called with (answers scored, answers in all).

    Returns:
        One score a task, in the order asked for.

    Raises:
        ConfigError: a task is unknown, the limit is not positive, or the harness is not installed.
        TextError: a file is missing or damaged, or the hub cannot be reached.
    """
    check_tasks(tasks, data, limit)
    wanted: list[str | dict[str, Any]] = [definition(task, data) for task in tasks] if data else list(tasks)
    # Where a model's state is no cache of keys and values, the harness reads a question again for every answer.
    stateful = getattr(model, "_is_stateful", False)
    score = None if stateful else partial(log_likelihoods, model, on_request=on_request)
    results = run_harness(model, tokenizer, wanted, score=score, limit=limit, on_request=on_request)
    return [_score(task, results) for task in tasks]


def check_tasks(tasks: Sequence[str], data: Path | None, limit: int | None) -> None:
    """Refuse what would fail after a model has been opened.

    Raises:
        ConfigError, TextError: see `evaluate_tasks`.
    """
    if tasks:
        check_harness()
    elif limit is not None or data is not None:
        raise ConfigError("limit and task_data are for tasks; name some, or leave these options out")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 item, not {limit}")
    if data is None:
        if tasks:
            check_names(tasks)
            check_hub()
        return
    for task in tasks:
        for file in definition(task, data)["dataset_kwargs"]["files"]:
            if not (data / file).is_file():
                raise TextError(
                    f"task {task}: {data / file} is missing; --task-data names the folder that holds {file}"
                )


def check_hub() -> None:
    """See that data sets can be had: from the hub, or, where it is not to be asked, from what was fetched before.

    Raises:
        TextError: the hub cannot be reached.
    """
    if not is_offline_by_choice() and not hub_is_reachable():
        raise TextError("the hub cannot be reached, and tasks come from there; give local files with --task-data DIR")


def definition(task: str, data: Path) -> dict[str, Any]:
    """The configuration of one of `TASKS` for the harness, reading files under `data`.

    Raises:
        ConfigError: there is no definition of this name.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r} is unknown for local files; choose from {', '.join(TASKS)}")
    text = resources.files("arbllm.evaluation").joinpath("definitions", f"{task}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text) | {"custom_dataset": partial(_load, data)}


def averages(scores: Iterable[TaskScore]) -> tuple[float, float]:
    """Mean accuracy over tasks; and with `acc_norm` in place of `acc` where a task has it."""
    scores = list(scores)
    return mean(s.acc for s in scores), mean(s.acc if s.acc_norm is None else s.acc_norm for s in scores)


def _load(data: Path, *, files: Sequence[str], **_: Any) -> dict[str, Any]:
    """The rows of a data set, as the harness takes them; several files lie side by side, row by row."""
    from datasets import Dataset

    parts = [list(_rows(data / file)) for file in files]
    if len({len(part) for part in parts}) != 1 or not parts[0]:
        raise TextError(f"{', '.join(files)} in {data}: empty, or of different lengths")
    rows = [{key: value for row in together for key, value in row.items()} for together in zip(*parts, strict=True)]
    return {"validation": Dataset.from_list(rows)}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """A row a line: of a `.jsonl` file its object, of a `.lst` file a label."""
    # Not `splitlines`: JSON may hold characters that it takes for the ends of lines.
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            yield {"label": int(line)} if path.suffix == ".lst" else json.loads(line)
        except ValueError as error:
            raise TextError(f"{path}: line {number} is not what it should be ({error})") from error


def _score(task: str, results: dict[str, Any]) -> TaskScore:
    figures = results["results"][task]
    if "acc,none" not in figures:
        raise ConfigError(f"task {task} has no accuracy; choose multiple-choice tasks")
    return TaskScore(
        task=task,
        items=results["n-samples"][task]["effective"],
        acc=figures["acc,none"],
        acc_stderr=_number(figures["acc_stderr,none"]),
        acc_norm=figures.get("acc_norm,none"),
        acc_norm_stderr=_number(figures.get("acc_norm_stderr,none")),
    )


def _number(value: Any) -> float | None:
    """The harness has words for what it cannot tell."""
    return value if isinstance(value, float) else None
