import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from arbllm.evaluation import figures
from arbllm.evaluation.methods import PARTS
from arbllm.evaluation.write_report import _sort_key, markdown, render, write_report

LINEARS = [f"model.layers.{block}.{kind}" for block in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def row(method: str, family: str, bits: float, perplexity: float | None, error: float | None) -> dict:
    values = {
        "method": method,
        "family": family,
        "nominal_bits": bits,
        "true_bits": bits,
        "bytes": int(bits * 1e6),
        "parts": dict.fromkeys(PARTS, 0) | {"signs": int(bits * 1e6)},
        "perplexity": {"wiki.test.raw": perplexity, "c4": perplexity},
        "tasks": [
            {"task": "piqa", "items": 9, "acc": 0.5, "acc_stderr": 0.125, "acc_norm": 0.625, "acc_norm_stderr": 0.1}
        ],
        "average_acc": 0.5,
        "average_acc_norm": 0.625,
        "tokens_per_second": 10.0,
        "samples": [{"prompt": "Once", "text": f"<{method}> upon"}],
    }
    if error is None:
        return values
    return values | {
        "output_error": error,
        "output_errors": {name: error * (1 + place) for place, name in enumerate(LINEARS)},
        "seconds": 3.0,
        "peak_memory_bytes": 10**9,
    }


@pytest.fixture
def results() -> dict:
    rows = [
        row("fp16", "fp16", 16, 10.0, None),
        row("gptq-3", "gptq", 3.2, 20.0, 0.01),
        row("arb-rcx-2.25", "arb-rcx", 2.25, 15.0, 0.02),
        row("hqq-1", "hqq", 1.5, None, 1.2),
    ]
    calibration = {"text": "wiki.valid.raw", "windows": 2, "window_length": 64, "seed": 0}
    settings = {"model": "/models/a & b", "calibration": calibration, "context": 64, "max_windows": None}
    settings |= {"tasks": ["piqa"], "limit": 9, "task_data": None, "texts": ["wiki.test.raw", "c4"]}
    return {"settings": settings, "versions": {"arbllm": "1"}, "machine": "2 cores", "rows": rows}


class _Tags(HTMLParser):
    VOID = ("meta", "br", "path", "use", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_the_same_every_time(results, tmp_path):
    first, second = (write_report(results, tmp_path).read_text() for _ in range(2))
    assert first == second


def test_the_page_opens_without_a_network(results, tmp_path):
    text = write_report(results, tmp_path).read_text()
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(source.startswith("#") for source in tags.sources)
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.count("<svg") == 7
    names = {file.name for file in tmp_path.glob("*.png")}
    pareto = {f"pareto-{size}-{text}.png" for size in ("bits", "bytes") for text in ("wiki-test-raw", "c4")}
    assert names == pareto | {"error-by-layer.png", "error-by-kind.png", "storage.png"}
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names)


def test_what_the_page_says(results):
    text = render(results, {})
    assert "<strong>On c4, no method of the same true bits or fewer has a lower perplexity than: arb-rcx-2.25" in text
    assert "gptq-3 (3.20 bits, 20.00) is beaten by arb-rcx-2.25 (2.25 bits, 15.00)." in text
    assert "a &amp; b: methods compared" in text
    assert "&lt;gptq-3&gt; upon" in text
    assert "Published, not measured here" in text
    assert "50.0 ± 12.5 | 62.5 ± 10.0" in text
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    cells = [re.findall(r'<td data-value="([^"]*)">([^<]*)</td>', line) for line in body.split("</tr>")[:-1]]
    assert [line[0][1] for line in cells] == ["fp16", "gptq-3", "arb-rcx-2.25", "hqq-1"]
    assert cells[3][1] == ("1e300", "not finite")
    assert cells[0][-2] == ("", "")
    assert [float(line[6][0]) for line in cells] == [16, 3.2, 2.25, 1.5]


def test_markdown(results):
    text = markdown(results)
    assert "| gptq-3 | 20.00 | 20.00 | 2.00 | 0.500 | 3.20 | 3.2 | 0.0100 |" in text
    assert text.startswith("- On wiki.test.raw, no method")
    assert json.dumps(results)


def test_kinds_of_linears_keep_their_places(results):
    """Methods list their linears in different orders."""
    rows = results["rows"]
    turned = rows[2] | {"output_errors": dict(reversed(rows[2]["output_errors"].items()))}
    pictures = [figures.error_by_kind(shown) for shown in (rows, [*rows[:2], turned, *rows[3:]])]
    marks = [
        {tuple(point) for mark in picture.axes[0].collections for point in mark.get_offsets().tolist()}
        for picture in pictures
    ]
    assert marks[0] == marks[1]
    labels = [label.get_text() for label in pictures[1].axes[0].get_yticklabels()]
    assert labels == ["q_proj", "up_proj"]


def test_names_stay_inside_the_picture(results):
    for size in ("true_bits", "bytes"):
        picture = figures.pareto(results["rows"], "c4", size)
        picture.draw_without_rendering()
        axes = picture.axes[0]
        names = [text for text in axes.texts if text.get_text()]
        assert {name.get_text() for name in names} == {"fp16", "gptq-3", "arb-rcx-2.25"}  # the last has no perplexity
        assert len(names) == 3
        boxes = [name.get_window_extent() for name in names]
        assert all(box.x0 >= 0 and box.x1 <= picture.bbox.x1 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_collapsed_row_is_marked_at_the_edge(results):
    rows = [*results["rows"], row("hqq-2", "hqq", 2.5, 1e6, 0.5)]
    axes = figures.pareto(rows, "c4", "true_bits").axes[0]
    low, high = axes.get_ylim()
    assert low < 10.0
    assert 10.0 * figures.COLLAPSED < high < 10.0 * figures.COLLAPSED * 5
    labels = {text.get_text() for text in axes.texts}
    assert {"hqq-2: 1,000,000", "gptq-3"} <= labels


def test_names_of_collapsed_rows_stay_apart_and_inside_the_picture(results):
    collapsed = [row(name, "arb", bits, 1e8, 0.5) for name, bits in (("arb", 2.9), ("arb-x", 3.4), ("billm", 2.5))]
    picture = figures.pareto([*results["rows"], *collapsed], "c4", "true_bits")
    picture.draw_without_rendering()
    boxes = [text.get_window_extent() for text in picture.axes[0].texts if "100,000,000" in text.get_text()]
    assert len(boxes) == 3
    assert all(box.y1 <= picture.bbox.y1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_texts_of_like_names_keep_their_captions(results, tmp_path):
    for each in results["rows"]:
        each["perplexity"] = {"wiki.test.raw": 10.0, "wiki.valid.raw": 11.0}
    text = write_report(results, tmp_path).read_text()
    for name in ("wiki.test.raw", "wiki.valid.raw"):
        assert text.count(f"against perplexity on {name}") == 4  # two pictures, each with a caption and a label


def test_a_report_of_nothing_but_collapsed_models(results, tmp_path):
    for each in results["rows"]:
        each["perplexity"] = dict.fromkeys(each["perplexity"], None)
    assert "not finite" in write_report(results, tmp_path).read_text()


def test_names_of_texts_may_hold_anything(results, tmp_path):
    names = ["cost_$5_vs_$6_.txt", "a$\\foo$.txt", "wiki.txt", "wiki-txt", "книги.txt", "новости.txt", "книги"]
    for each in results["rows"]:
        each["perplexity"] = dict.fromkeys(names, next(iter(each["perplexity"].values())))
    page = write_report(results, tmp_path).read_text()
    stems = figures.stems(names)
    assert len(set(stems)) == len(names)
    for name, stem in zip(names, stems, strict=True):
        assert (tmp_path / f"pareto-bits-{stem}.png").exists()
        assert f"perplexity on {name}; the line" in page


def test_errors_that_were_not_finite_are_left_out(results, tmp_path):
    collapsed = results["rows"][1]
    collapsed["output_error"] = None
    collapsed["output_errors"] = dict.fromkeys(LINEARS)
    write_report(results, tmp_path)
    assert "| gptq-3 | 20.00 | 20.00 | 2.00 | 0.500 | 3.20 | 3.2 |  |" in markdown(results)


def test_methods_are_sorted_by_their_bits():
    names = ["arb-rcx-1.6", "arb-rcx-2", "arb-rcx-2.25", "arb-rcx-2.25-untuned", "arb-rcx-2.5", "arb-rcx-10"]
    shuffled = names[1::2] + names[::2]
    assert sorted(shuffled, key=_sort_key) == names
