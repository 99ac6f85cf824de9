import importlib

import pytest


@pytest.fixture
def questions(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    return importlib.import_module("questions")


def row(method, **accuracies):
    tasks = [{"task": task, "acc": acc, "acc_stderr": 0.03} for task, acc in accuracies.items()]
    return {"method": method, "tasks": tasks}


def test_the_last_mean_leaves_out_the_task_of_yes_and_no(questions):
    rows = [
        row("fp16", arc_easy=0.5, boolq=0.9, piqa=0.7),
        row("unasked"),
        row("arb", piqa=0.5, boolq=0.6, arc_easy=0.4),
    ]
    assert questions.question_table(rows).splitlines() == [
        "|  | arc_easy | boolq | piqa | mean | without boolq |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| fp16 | 0.500 | 0.900 | 0.700 | 0.700 | 0.600 ± 0.021 |",
        "| arb | 0.400 | 0.600 | 0.500 | 0.500 | 0.450 ± 0.021 |",
    ]
    assert questions.question_table([row("unasked")]) == ""
