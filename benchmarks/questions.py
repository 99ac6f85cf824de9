"""The table of docs/results.md that has every method's accuracy by task, and a mean without the task of yes and no."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from arbllm.evaluation.written import markdown_table

YES_OR_NO = "boolq"
"""Always yes is right in three of five of its questions; models that know little differ in how often they say so."""


def question_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown: a row for each method that was asked, a column for each task, and two means.

    Args:
        rows: of a comparison's results, with `method` and, under `tasks`, the `task`, `acc` and `acc_stderr` of each.

    Returns:
        "" where no method was asked. The last mean leaves out `YES_OR_NO` and has its standard error by the number of
        questions.
    """
    asked = [row for row in rows if row["tasks"]]
    if not asked:
        return ""
    names = [task["task"] for task in asked[0]["tasks"]]
    head = ["", *names, "mean", f"without {YES_OR_NO}"]
    lines = []
    for row in asked:
        tasks = {task["task"]: task for task in row["tasks"]}
        rest = [task for name, task in tasks.items() if name != YES_OR_NO]
        error = math.hypot(*(task["acc_stderr"] for task in rest)) / len(rest)
        means = [f"{_mean(list(tasks.values())):.3f}", f"{_mean(rest):.3f} ± {error:.3f}"]
        lines.append([row["method"], *(f"{tasks[name]['acc']:.3f}" for name in names), *means])
    return markdown_table(head, lines)


def _mean(tasks: Sequence[Mapping[str, Any]]) -> float:
    return sum(task["acc"] for task in tasks) / len(tasks)
