import json

import pytest

from arbllm.errors import ConfigError
from arbllm.evaluation.ablate import PAGE, RESULTS, ablate, page, variants
from arbllm.evaluation.methods import Calibration
from arbllm.evaluation.protocol import Protocol
from tests.tiny import save_tiny


def test_the_studies_of_the_paper_are_there():
    rows = variants()
    studies = {row.study for row in rows}
    assert len(studies) == 10
    for study in studies:
        own = [row for row in rows if row.study == study]
        assert len({row.label for row in own}) == len(own) >= 2
    jobs = {row.name: (row.config, row.windows, row.tune) for row in rows}
    assert all(jobs[row.name] == (row.config, row.windows, row.tune) for row in rows)
    assert len(jobs) < len(rows)  # studies share jobs


def test_what_arb_rcx_adds(tmp_path):
    model = save_tiny(tmp_path / "dense")
    protocol = Protocol(str(model), Calibration("builtin", 4, 64, 0, "cpu"), ("builtin",), 64, 2)
    rows = ablate(protocol, tmp_path / "out", studies=["arb-rcx"], isolate=False)["rows"]
    errors = {row["variant"]: row["output_error"] for row in rows}
    assert len(errors) == 4
    assert len(set(errors.values())) == 4  # each is a job of its own
    assert all(row["true_bits"] <= 2.25 and row["published"] is None for row in rows)


def test_ablations_on_a_tiny_model(tmp_path):
    model = save_tiny(tmp_path / "dense")
    protocol = Protocol(str(model), Calibration("builtin", 4, 64, 0, "cpu"), ("builtin",), 64, 2)
    steps: list[tuple[str, str]] = []
    studies = ["calibration", "groups"]
    options = {"studies": studies, "isolate": False, "on_step": lambda *step: steps.append(step)}
    results = ablate(protocol, tmp_path / "out", **options)
    assert [row["windows"] for row in results["rows"]] == [2, 4, 8, 4, 4, 4, 4]
    assert results["rows"][1]["perplexity"] == results["rows"][3]["perplexity"]  # arb-x as it is, twice
    two, four = (row for row in results["rows"] if row["variant"].startswith("arb-rc"))
    assert four["true_bits"] > two["true_bits"]
    assert four["output_error"] < two["output_error"]
    assert [row["published"] for row in results["rows"]] == [24.79, 21.81, 21.88, 21.81, 6.55, 14.03, 12.77]
    assert len(steps) == 2 * 7  # fp16 and six jobs, each quantized and evaluated
    assert json.loads((tmp_path / "out" / RESULTS).read_text()) == results
    assert (tmp_path / "out" / PAGE).read_text() == page(results)
    again = ablate(protocol, tmp_path / "out", **options)
    assert (again, len(steps)) == (results, 14)
    with pytest.raises(ConfigError, match=r"'nothing' is unknown.*iterations"):
        ablate(protocol, tmp_path / "out", studies=["nothing"])
