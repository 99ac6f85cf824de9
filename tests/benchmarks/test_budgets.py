import importlib

import pytest


@pytest.fixture
def budgets(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    return importlib.import_module("budgets")


def row(perplexity, bits=2.25):
    return {"perplexity": perplexity, "quantize": {"true_bits_per_weight": bits, "bytes_on_disk": 86_800_000}}


def test_rows_stand_in_the_columns_of_how_they_were_made(budgets):
    found = {
        "arb-rcx-2.25": row(30.0),
        "arb-rcx-1.1-untuned": row(1234.0, 1.1),
        "arb-rcx-1.1 on C4": row(80.0, 1.1),
        "gptq-2": row(400.0, 2.15),
        "hqq-2": row(1e6),
    }
    assert budgets.budget_table(found, 20.0).splitlines() == [
        "| budget | true bits | MB | untuned | tuned | tuned on C4 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 1.1 | 1.10 | 86.8 | 1,234 (61.70 x) |  | 80.00 (4.00 x) |",
        "| 2.25 | 2.25 | 86.8 |  | 30.00 (1.50 x) |  |",
        "| gptq-2 | 2.15 | 86.8 | 400.00 (20.00 x) |  |  |",
    ]


def test_methods_of_the_table_are_known(budgets):
    from arbllm.evaluation.methods import find_recipe

    names = budgets.budget_methods()
    assert len(set(names)) == 2 * len(budgets.BUDGETS)
    assert {find_recipe(name).config.bits for name in names} == set(budgets.BUDGETS)
