"""The report of a comparison: one page that opens from the disk, and its pictures as PNGs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from arbllm.evaluation.figures import COLLAPSED, all_figures, as_svg, save_png, stems
from arbllm.evaluation.frontier import Row, frontier, score, shown, verdict
from arbllm.evaluation.methods import FULL
from arbllm.evaluation.written import markdown_table

REPORT = "report.html"
CAPTIONS = {
    "pareto-bits": "True bits a weight of the linears against perplexity on {text}; the line joins the frontier. "
    f"Triangles with a number stand for rows beyond {COLLAPSED} times the least perplexity, which is that number.",
    "pareto-bytes": "Size of the whole file against perplexity on {text}.",
    "error-by-layer": "Output error, tr(D H Dᵀ) / tr(W H Wᵀ), of each decoder block's linears.",
    "error-by-kind": "Output error by kind of linear, over all blocks.",
    "storage": "What the bytes of a file are; codes are those of uniform grids, or plain weights.",
}
NOTES = (
    "Nominal bits count signs or codes alone, true bits everything stored for the linears. Bytes of peers are those "
    "that packed weights would take: they are evaluated as dense models, so their tokens per second are those of dense "
    "weights. Peak memory is that of quantization in a process of its own."
)


def write_report(results: dict[str, Any], out: Path) -> Path:
    """Write `report.html` and the PNGs into `out`.

    Args:
        results: what `arbllm.evaluation.compare.compare` returned.
        out: an existing directory.

    Returns:
        The page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figures = all_figures(results["rows"])
    for name, figure in figures.items():
        save_png(figure, out / f"{name}.png")
    page = out / REPORT
    pictures = {name: as_svg(figure, name) for name, figure in figures.items()}
    page.write_text(render(results, pictures), encoding="utf-8")
    return page


def render(results: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page as text.

    Args:
        results: see `write_report`.
        pictures: `svg` elements by the names of `all_figures`.
    """
    rows, settings = results["rows"], results["settings"]
    texts = list(rows[0]["perplexity"]) if rows else []
    folder = resources.files("arbllm.evaluation").joinpath("page")
    published = json.loads(folder.joinpath("published.json").read_text(encoding="utf-8"))
    return Template(folder.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{Path(settings['model']).name}: methods compared"),
        protocol=escape(_protocol(settings, texts)),
        verdict="".join(_paragraphs(rows, text) for text in texts),
        table=_results(rows, texts),
        notes=escape(NOTES),
        figures="".join(_figure(name, svg, texts) for name, svg in pictures.items()),
        questions=_questions(rows),
        samples=_samples(rows),
        published=_published(published),
        made=escape(
            f"Made on {results['machine']} with "
            + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        ),
    )


def _protocol(settings: dict[str, Any], texts: Sequence[str]) -> str:
    calibration = settings["calibration"]
    windows = "all windows" if settings["max_windows"] is None else f"the first {settings['max_windows']} windows"
    line = (
        f"Calibrated on {calibration['windows']} windows of {calibration['window_length']} tokens of "
        f"{Path(calibration['text']).name}, seed {calibration['seed']}. Perplexity over {windows} of "
        f"{settings['context']} tokens of {', '.join(texts) or 'no text'}."
    )
    if calibration.get("distill_windows"):
        line += f" Distilled on {calibration['distill_windows']} windows of the calibration text."
    if settings["tasks"]:
        items = "all items" if settings["limit"] is None else f"{settings['limit']} items of each"
        line += f" Zero-shot tasks on {items}: {', '.join(settings['tasks'])}."
    return line


def _paragraphs(rows: Sequence[Row], text: str) -> str:
    first, *others = verdict(rows, text)
    listed = "".join(f"<li>{escape(line)}</li>" for line in others)
    return f"<p><strong>{escape(first)}</strong></p>{listed and f'<ul>{listed}</ul>'}"


def _results(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """The sortable table; a cell's `data-value` is what it is sorted by."""
    head = ["method", *(f"perplexity {text}" for text in texts), "QA average", "QA, normalized", "nominal bits"]
    head += ["true bits", "MB", "output error", "peak GB", "seconds", "tokens/s"]
    best = {row["method"] for text in texts for row in frontier(rows, text)}
    lines = []
    for row in rows:
        cells = [_cell(_sort_key(row["method"]), escape(row["method"]))]
        cells += [_number(score(row, text), shown(score(row, text))) for text in texts]
        cells += [_value(row, "average_acc", "{:.3f}"), _value(row, "average_acc_norm", "{:.3f}")]
        cells += [_value(row, "nominal_bits", "{:.2f}"), _value(row, "true_bits", "{:.3f}")]
        cells += [_value(row, "bytes", "{:.1f}", 1e6), _value(row, "output_error", "{:.4f}")]
        cells += [_value(row, "peak_memory_bytes", "{:.2f}", 1e9), _value(row, "seconds", "{:.0f}")]
        cells += [_value(row, "tokens_per_second", "{:.1f}")]
        kind = ' class="best"' if row["method"] in best else ""
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    names = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    return f'<table class="sortable"><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _value(row: Row, name: str, form: str, unit: float = 1.0) -> str:
    value = row.get(name)
    return _cell("", "") if value is None else _number(value, form.format(value / unit))


def _sort_key(method: str) -> str:
    """A name with its bits in figures of one length: 2.25 lies between 2 and 2.5."""
    return re.sub(r"\d+(\.\d+)?", lambda bits: f"{float(bits[0]):08.3f}", method)


def _number(value: float, text: str) -> str:
    return _cell(f"{value:.8g}" if value < float("inf") else "1e300", text)


def _cell(value: str, text: str) -> str:
    return f'<td data-value="{escape(value)}">{text}</td>'


def _figure(name: str, svg: str, texts: Sequence[str]) -> str:
    kind = next(kind for kind in CAPTIONS if name.startswith(kind))
    text = dict(zip(stems(texts), texts, strict=True)).get(name.removeprefix(kind).strip("-"), "")
    caption = escape(CAPTIONS[kind].format(text=text))
    return f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'


def _questions(rows: Sequence[Row]) -> str:
    """Accuracy by task, with standard errors; empty without tasks."""
    tasks = list(dict.fromkeys(task["task"] for row in rows for task in row["tasks"]))
    if not tasks:
        return ""
    lines = []
    for row in rows:
        scores = {task["task"]: task for task in row["tasks"]}
        cells = [_accuracy(scores[task]) if task in scores else "" for task in tasks]
        lines.append([row["method"], *cells])
    table = _table(["accuracy, per cent", *tasks], lines)
    note = "Accuracy ± its standard error; behind the stroke with log likelihoods divided by the answers' lengths."
    return f'<h2>Questions</h2><p class="soft">{note}</p><div class="wide">{table}</div>'


def _accuracy(score: dict[str, Any]) -> str:
    shares = [_share(score[name], score.get(f"{name}_stderr")) for name in ("acc", "acc_norm") if name in score]
    return " | ".join(shares)


def _share(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _samples(rows: Sequence[Row]) -> str:
    """Continuations, a heading for each beginning."""
    blocks: dict[str, list[str]] = {}
    for row in rows:
        for sample in row["samples"]:
            text = f"<blockquote>{escape(sample['text'].strip()) or '(nothing)'}</blockquote>"
            blocks.setdefault(sample["prompt"], []).append(f"<div><b>{escape(row['method'])}</b>{text}</div>")
    return "".join(
        f'<h3>{escape(prompt)} …</h3><div class="samples">{"".join(texts)}</div>' for prompt, texts in blocks.items()
    )


def _published(published: dict[str, Any]) -> str:
    tables = [_table(table["head"], table["rows"]) for table in published["tables"]]
    return (
        "<h2>Published, not measured here</h2>"
        f'<p class="soft">{escape(published["source"])}. {escape(published["note"])}</p>'
        + "".join(f'<div class="wide">{table}</div><br>' for table in tables)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(_shown(value))}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else shown(value)


def markdown(results: dict[str, Any]) -> str:
    """The main figures as a table in Markdown, what they say at its head."""
    rows = results["rows"]
    texts = list(rows[0]["perplexity"]) if rows else []
    head = ["", *texts, "ratio", "QA", "true bits", "MB", "output error"]
    lines = []
    full = next((row for row in rows if row["method"] == FULL), None)
    for row in rows:
        ratio = shown(score(row, texts[0]) / score(full, texts[0])) if full and texts else ""
        figures = [shown(score(row, text)) for text in texts]
        average = "" if row["average_acc"] is None else f"{row['average_acc']:.3f}"
        error = "" if row.get("output_error") is None else f"{row['output_error']:.4f}"
        sizes = [f"{row['true_bits']:.2f}", f"{row['bytes'] / 1e6:.1f}"]
        lines.append([row["method"], *figures, ratio, average, *sizes, error])
    said = "\n".join(f"- {line}" for text in texts for line in verdict(rows, text))
    return f"{said}\n\n{markdown_table(head, lines)}\n"
