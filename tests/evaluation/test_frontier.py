import math

from arbllm.evaluation.frontier import beaten_by, frontier, shown, verdict


def row(method: str, bits: float, perplexity: float | None, size: int = 0) -> dict:
    return {"method": method, "true_bits": bits, "bytes": size, "perplexity": {"wiki": perplexity}}


ROWS = [
    row("full", 16, 10, 9),
    row("four", 4, 12, 1),
    row("three", 3, 20, 3),
    row("bad", 3.5, 30, 2),
    row("lost", 1, None, 1),
]


def test_the_frontier_is_what_nothing_smaller_equals():
    assert [found["method"] for found in frontier(ROWS, "wiki")] == ["three", "four", "full"]
    assert [found["method"] for found in frontier(ROWS, "wiki", "bytes")] == ["four", "full"]


def test_a_thousandth_of_a_bit_less_is_no_excuse():
    rows = [row("worse", 2.2509, 50, 100), row("better", 2.2511, 40, 100), row("smaller", 2.2, 60, 90)]
    assert [found["method"] for found in frontier(rows, "wiki")] == ["smaller", "better"]
    assert [found["method"] for found in frontier(rows, "wiki", "bytes")] == ["smaller", "better"]
    assert beaten_by(rows[0], rows, "wiki") is rows[1]


def test_who_is_beaten_by_whom():
    names = {
        found["method"]: (rival or {"method": None})["method"]
        for found in ROWS
        for rival in [beaten_by(found, ROWS, "wiki")]
    }
    assert names == {"full": None, "four": None, "three": None, "bad": "three", "lost": None}


def test_the_verdict_names_both():
    first, *others = verdict(ROWS, "wiki")
    assert "three (3.00 bits, 20.00), four (4.00 bits, 12.00), full (16.00 bits, 10.00)" in first
    assert others == ["bad (3.50 bits, 30.00) is beaten by three (3.00 bits, 20.00)."]


def test_perplexities_as_shown():
    assert [shown(value) for value in (9.876, 12345.6, math.inf)] == ["9.88", "12,346", "not finite"]
