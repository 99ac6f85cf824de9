"""The pictures of a comparison, as matplotlib figures: narrow, so that a phone shows their letters at full size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from arbllm.errors import ConfigError
from arbllm.evaluation.frontier import Row, frontier, score, shown
from arbllm.evaluation.methods import FULL, PARTS

SIZE = (5.6, 5.6)
COLOURS = {
    FULL: "#22223b", "rtn": "#9c6644", "gptq": "#2a9134", "gptq-act-order": "#7cb518", "hqq": "#0077b6",
    "billm": "#8d99ae", "arb": "#e0a458", "arb-x": "#4f8a8b", "arb-rc": "#c8553d", "arb-rcx": "#6a4c93",
}  # fmt: skip
OTHER = "#555555"
COLLAPSED = 10
ROOM_ABOVE = 0.45  # for the names of rows that collapsed, in heights of the picture below them
MARKERS = {"rtn": "s", "gptq": "D", "gptq-act-order": "d", "hqq": "v", FULL: "*"}
LETTER, LINE, MARKER = 6.2, 14.0, 7.0  # a letter's width, a line's height, half a marker's width, in pixels
CLEARER = 5.0  # pixels by which a name should be nearer to its own point than to any other
Box = tuple[float, float, float, float]  # left, low, right, high
Label = tuple[str, tuple[float, float], str]  # name, point, colour
Spot = tuple[int, int]  # of a label: left, centred or right of its point (-1, 0, 1), and below, beside or above it
SPOTS: tuple[Spot, ...] = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
PART_COLOURS = ("#6c757d", "#6a4c93", "#b39cd0", "#e0a458", "#c8553d", "#a8dadc", "#dee2e6")


def require_matplotlib() -> None:
    """See that pictures can be drawn.

    Raises:
        ConfigError: they cannot, without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install matplotlib")


def all_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures by file name, those that the rows allow.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl

    figures = {}
    # Names of texts and methods may hold dollars, which would begin a formula.
    with mpl.rc_context({"font.size": 11, "font.family": "sans-serif", "text.parse_math": False}):
        texts = list(rows[0]["perplexity"]) if rows else []
        for text, stem in zip(texts, stems(texts), strict=True):
            figures[f"pareto-bits-{stem}"] = pareto(rows, text, "true_bits")
            figures[f"pareto-bytes-{stem}"] = pareto(rows, text, "bytes")
        if any(map(_errors, rows)):
            figures["error-by-layer"] = error_by_layer(rows)
            figures["error-by-kind"] = error_by_kind(rows)
        figures["storage"] = storage(rows)
    return figures


def stems(texts: Sequence[str]) -> list[str]:
    """The names of texts as they stand in names of figures, each another one."""
    found: list[str] = []
    for text in texts:
        stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "text"
        further = (f"{stem}-{number}" for number in range(2, len(texts) + 2))
        found.append(next(name for name in (stem, *further) if name not in found))
    return found


def save_png(figure: Any, path: Path) -> None:
    """Write a figure as a PNG."""
    figure.savefig(path, dpi=160, metadata={"Software": None})


def as_svg(figure: Any, name: str) -> str:
    """A figure as an `svg` element to put into a page: by its name its ids are its own, and the same every time."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(
        r'(<svg [^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg [^>]*?height=")[^"]*"', r'\1auto"', svg[svg.index("<svg") :]),
    )


def pareto(rows: Sequence[Row], text: str, size: str) -> Any:
    """Perplexity against true bits or megabytes, both logarithmic, the frontier as a line.

    Rows of more than `COLLAPSED` times the least perplexity are marked at the upper edge, what they have above them.
    """
    figure, axes = _axes()
    unit = 1.0 if size == "true_bits" else 1e6
    finite = [row for row in rows if math.isfinite(score(row, text))]
    edge = COLLAPSED * min((score(row, text) for row in finite), default=1.0)
    points = [(row[size] / unit, min(score(row, text), edge)) for row in finite]
    best = [row for row in frontier(finite, text, size) if score(row, text) < edge]
    axes.plot([row[size] / unit for row in best], [score(row, text) for row in best], color="#bbbbbb", zorder=1,
              label="frontier", drawstyle="steps-post")  # fmt: skip
    if points:  # else there is nothing that a logarithm could be taken of
        axes.set_xscale("log")
        axes.set_yscale("log")
    labels: list[Label] = []
    beyond: list[Label] = []
    for row, (x, y) in zip(finite, points, strict=True):
        winner, family, colour = row in best, row["family"], COLOURS.get(row["family"], OTHER)
        collapsed = score(row, text) > edge
        value = f": {shown(score(row, text))}" if collapsed else ""
        (beyond if collapsed else labels).append((row["method"] + value, (x, y), colour))
        axes.scatter(x, y, color=colour, zorder=3, marker="^" if collapsed else MARKERS.get(family, "o"),
                     s=70 if winner else 36, edgecolor="black" if winner else "none")  # fmt: skip
    _plain_ticks(axes.xaxis, [x for x, _ in points])
    _plain_ticks(axes.yaxis, [y for _, y in points])
    axes.margins(x=0.32, y=0.12)
    if beyond:
        low = axes.get_ylim()[0]
        axes.set_ylim(low, edge * (edge / low) ** ROOM_ABOVE)
    axes.set_xlabel("true bits per weight of the linears" if size == "true_bits" else "megabytes of the whole file")
    axes.set_ylabel(f"perplexity, {text}")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    figure.draw_without_rendering()  # lays out, so that pixels are those of the picture
    _label_points(axes, labels)
    for name, point, colour in beyond:
        axes.annotate(name, point, (0, 7), textcoords="offset points", fontsize=9, color=colour, rotation=90,
                      ha="center", va="bottom")  # fmt: skip
    return figure


def error_by_layer(rows: Sequence[Row]) -> Any:
    """Mean output error of each decoder block's linears, a line a method."""
    figure, axes = _axes()
    drawn: list[float] = []
    for row in rows:
        if errors := _errors(row):
            blocks = _grouped((_block(name), error) for name, error in errors.items())
            means = [mean(values) for values in blocks.values()]
            drawn += means
            axes.plot(list(blocks), means, label=row["method"], linewidth=1.4,
                      color=COLOURS.get(row["family"], OTHER), marker=MARKERS.get(row["family"], "o"), markersize=3,
                      alpha=_shade(row, rows))  # fmt: skip
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis, drawn)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("mean output error")
    _legend(figure, axes)
    return figure


def error_by_kind(rows: Sequence[Row]) -> Any:
    """Mean output error by kind of linear, a mark a method."""
    figure, axes = _axes()
    drawn: list[float] = []
    kinds = list(dict.fromkeys(_kind(name) for row in rows for name in _errors(row)))
    for row in rows:
        if errors := _errors(row):
            groups = _grouped((_kind(name), error) for name, error in errors.items())
            places = [kinds.index(kind) for kind in groups]
            means = [mean(values) for values in groups.values()]
            drawn += means
            axes.scatter(means, places, label=row["method"], s=44,
                         alpha=_shade(row, rows), color=COLOURS.get(row["family"], OTHER),
                         marker=MARKERS.get(row["family"], "o"))  # fmt: skip
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, drawn)
    axes.set_xlabel("mean output error")
    _legend(figure, axes)
    return figure


def storage(rows: Sequence[Row]) -> Any:
    """What the bytes of each file are, a bar a method."""
    figure, axes = _axes(height=1.6 + 0.32 * len(rows))
    left = [0.0] * len(rows)
    names = [row["method"] for row in rows]
    for part, colour in zip(PARTS, PART_COLOURS, strict=True):
        widths = [row["parts"][part] / 1e6 for row in rows]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=part, edgecolor="white", linewidth=0.4)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("megabytes")
    _legend(figure, axes)
    return figure


def _axes(height: float = SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label_points(axes: Any, labels: Sequence[Label]) -> None:
    """Names beside their points, each at the spot where it covers least of the points and of the names before it.

    A name that could be taken for another point's counts as covering one letter for each pixel that it is too near.
    """
    axes.autoscale_view()
    frame = axes.get_window_extent()
    places = [tuple(axes.transData.transform(point)) for _, point, _ in labels]
    boxes: list[Box] = [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in places]
    for name, point, colour in sorted(labels, key=lambda label: -len(label[0])):
        x, y = axes.transData.transform(point)
        width = LETTER * len(name)
        spots: list[tuple[Spot, Box]] = []
        for across, up in SPOTS:
            left = x + across * (MARKER + width / 2) - width / 2
            low = y + up * (LINE / 2 + (2 if across else MARKER)) - LINE / 2
            spots.append(((across, up), (left, low, left + width, low + LINE)))
        whole = (frame.x0, -math.inf, frame.x1, math.inf)
        costs = [_crowding(box, boxes, whole) + LETTER * LINE * _doubt(box, (x, y), places) for _, box in spots]
        spot, box = spots[costs.index(min(costs))]
        boxes.append(box)
        _annotate(axes, name, point, spot, colour)


def _crowding(box: Box, others: Sequence[Box], frame: Box) -> float:
    """How much of a box lies over others and, which is worse, outside the frame."""
    return sum(_overlap(box, other) for other in others) - 3 * _overlap(box, frame)


def _doubt(box: Box, own: tuple[float, float], points: Sequence[tuple[float, ...]]) -> float:
    """By how many pixels a box is too near to points that are not its own."""
    near = _gap(box, own)
    return sum(max(CLEARER - (_gap(box, point) - near), 0.0) for point in points if tuple(point) != tuple(own))


def _gap(box: Box, point: Sequence[float]) -> float:
    """How far a point is from a box."""
    left, low, right, high = box
    x, y = point
    return math.hypot(max(left - x, x - right, 0.0), max(low - y, y - high, 0.0))


def _annotate(axes: Any, name: str, point: tuple[float, float], spot: Spot, colour: str) -> None:
    """Write a name so many half widths and lines away from its point."""
    from matplotlib.patheffects import withStroke

    across, up = spot
    axes.annotate(
        name, point, (5 * across, (3 if across else 6) * up), textcoords="offset points", fontsize=9, zorder=2,
        color=colour, path_effects=[withStroke(linewidth=3, foreground="white")],
        ha=("right", "center", "left")[across + 1], va=("top", "center", "bottom")[up + 1],
    )  # fmt: skip


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at round numbers, written out, on a logarithmic axis."""
    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return
    low, high = min(positive), max(positive)
    steps = (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [step * 10.0**power for power in range(-6, 8) for step in steps]
    ticks = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    axis.set_ticks(ticks, [f"{tick:,.0f}" if tick >= 10 else f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _shade(row: Row, rows: Sequence[Row]) -> float:
    """Members of a family in one colour, the more bits the stronger."""
    bits = sorted(other["true_bits"] for other in rows if other["family"] == row["family"])
    return 0.4 + 0.6 * (bits.index(row["true_bits"]) + 1) / len(bits)


def _errors(row: Row) -> dict[str, float]:
    """Output errors by linear, without those that were not finite."""
    return {name: error for name, error in row.get("output_errors", {}).items() if error is not None}


def _grouped(pairs: Iterable[tuple[Any, float]]) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _kind(name: str) -> str:
    """What a linear is called in its block: the last part of its name."""
    return name.rpartition(".")[2]


def _block(name: str) -> int:
    """The number of a linear's decoder block: the first number in its name."""
    return int(next(part for part in name.split(".") if part.isdecimal()))
