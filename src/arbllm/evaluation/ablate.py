"""The ablations of the paper's Table 4, on any model, and of what `arb-rcx` adds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from arbllm.config import DEFAULT_BITS, BinarizationConfig
from arbllm.errors import ConfigError
from arbllm.evaluation.compare import begin, perplexities, run_row
from arbllm.evaluation.frontier import score, shown
from arbllm.evaluation.methods import FULL, JOINT, Recipe
from arbllm.evaluation.protocol import Protocol, shown_settings
from arbllm.evaluation.steps import MODELS, Pieces
from arbllm.evaluation.written import markdown_table, write_json

RESULTS, PAGE = "ablation.json", "ablation.md"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        study: what is varied.
        label: the value that it takes here.
        config: method and options.
        windows: calibration windows, as a multiple of the protocol's.
        published: the label of the paper's row for LLaMA-7B, where it has one.
        tune: steps of tuning each block; None for the default.
    """

    study: str
    label: str
    config: BinarizationConfig
    windows: float = 1.0
    published: str | None = None
    tune: int | None = None

    @property
    def name(self) -> str:
        """Of its file: variants of several studies that are the same job share one."""
        c = self.config
        if c.method == JOINT:
            tune = "tuned" if self.tune is None else f"tune{self.tune}"
            return "-".join((c.method, "trellis" if c.trellis else "groups", tune, f"w{self.windows:g}"))
        words = (c.method, c.partition, f"g{c.groups}", f"k{c.block_size}", f"t{c.iterations}", c.split_on)
        return "-".join((*words, c.compensation, f"w{self.windows:g}"))


def variants() -> list[Variant]:
    """All rows, study by study."""
    x, rc = BinarizationConfig("arb-x"), BinarizationConfig("arb-rc")
    rows = [
        Variant("method", "billm", BinarizationConfig("billm", partition="column+group")),
        Variant("method", "arb", BinarizationConfig("arb"), published="ARB"),
        Variant("method", "arb-x", x, published="ARB-X"),
        Variant("method", "arb-rc", rc, published="ARB-RC"),
    ]
    for name, config, label in (("arb-x", x, "ARB-X"), ("arb-rc", rc, "ARB-RC")):
        without = replace(config, partition="column+group")
        rows.append(Variant("column-group bitmap", f"{name}, off", without, published=f"{label} without CGB"))
        rows.append(Variant("column-group bitmap", f"{name}, on", config, published=label))
    for partition, label in (
        ("none", "ARB-RC, neither bitmap"),
        ("column", "ARB-RC, column bitmap alone"),
        ("group", "ARB-RC, group bitmap alone"),
        ("cgb", "ARB-RC"),
    ):
        rows.append(Variant("bitmaps, arb-rc", partition, replace(rc, partition=partition), published=label))
    for factor, label in ((0.5, "64"), (1.0, "128"), (2.0, "256")):
        rows.append(Variant("calibration windows, arb-x", f"x {factor:g}", x, factor, f"ARB-X, {label} windows"))
    for iterations in (1, 3, 15):
        label = f"ARB-RC, {iterations} iteration{'s' * (iterations > 1)}"
        rows.append(Variant("iterations, arb-rc", str(iterations), replace(rc, iterations=iterations), published=label))
    for name, config, label in (("arb-x", x, "ARB-X"), ("arb-rc", rc, "ARB-RC")):
        rows.append(Variant("groups", f"{name}, 2", config, published=label))
        rows.append(Variant("groups", f"{name}, 4", replace(config, groups=4), published=f"{label}, 4 groups"))
    for size in (64, 128, 256):
        rows.append(Variant("block size, arb-rc", str(size), replace(rc, block_size=size)))
    for way in ("exact", "reference"):
        rows.append(Variant("compensation, arb-rc", way, replace(rc, compensation=way)))
    for split in ("weight", "saliency"):
        rows.append(Variant("split on, arb-rc", split, replace(rc, split_on=split)))
    for trellis, label in ((False, "columns with groups"), (True, "trellis")):
        joint = BinarizationConfig(JOINT, trellis=trellis)
        rows.append(Variant(f"{JOINT}, {DEFAULT_BITS} bits", f"{label}, untuned", joint, tune=0))
        rows.append(Variant(f"{JOINT}, {DEFAULT_BITS} bits", f"{label}, tuned", joint))
    return rows


def ablate(
    protocol: Protocol,
    out: Path,
    *,
    studies: Sequence[str] = (),
    isolate: bool = True,
    on_step: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """Run what is missing of the ablations; goes on where it stopped, as `arbllm.evaluation.compare.compare` does.

    `out` receives `ablation.json` and `ablation.md`.

    Args:
        protocol: what every variant goes through.
        out: a directory; made where it is not there.
        studies: beginnings of the names of studies to run; none for all.
        isolate: run every step in a process of its own.
        on_step: told (variant, step) as each step begins.

    Raises:
        ConfigError: a study is unknown, or `out` holds ablations with other settings.
        ArbllmError: a step failed; what was done before is kept.
    """
    chosen = _chosen(studies)
    windows = {variant: max(1, round(variant.windows * protocol.calibration.windows)) for variant in chosen}
    pieces = begin(protocol, out, most_windows=max(windows.values()))
    options: dict[str, Any] = {"isolate": isolate, "speed": False, "on_step": on_step}
    full = _figures(protocol, pieces, run_row(Recipe(FULL), protocol, pieces, out, **options))
    rows = []
    for variant in chosen:
        own = replace(protocol, calibration=replace(protocol.calibration, windows=windows[variant]))
        steps = run_row(Recipe(variant.name, variant.config, variant.tune), own, pieces, out, **options)
        shutil.rmtree(out / MODELS / variant.name, ignore_errors=True)
        facts = {"study": variant.study, "variant": variant.label, "windows": windows[variant]}
        facts |= {"config": variant.config.to_dict(), "tune": variant.tune, "published": _published(variant)}
        rows.append(facts | _figures(protocol, pieces, steps))
        results = {"settings": shown_settings(protocol), FULL: full, "rows": rows}
        write_json(out / RESULTS, results)
    (out / PAGE).write_text(page(results), encoding="utf-8")
    return results


def page(results: dict[str, Any]) -> str:
    """The table in Markdown, the best of each study in bold."""
    settings = results["settings"]
    calibration = settings["calibration"]
    texts = list(results[FULL]["perplexity"])
    head = ["study", "", *texts, "true bits", "output error", "published, LLaMA-7B"]
    lines = []
    for row in results["rows"]:
        rivals = [other for other in results["rows"] if other["study"] == row["study"]]
        figures = []
        for text in texts:
            best = score(row, text) == min(score(other, text) for other in rivals)
            figures.append(f"**{shown(score(row, text))}**" if best else shown(score(row, text)))
        published = "" if row["published"] is None else shown(row["published"])
        error = "" if row["output_error"] is None else f"{row['output_error']:.4f}"
        lines.append([row["study"], row["variant"], *figures, f"{row['true_bits']:.2f}", error, published])
    full = ", ".join(f"{shown(score(results[FULL], text))} on {text}" for text in texts)
    return (
        f"# Ablations on {Path(settings['model']).name}\n\n"
        f"Perplexity; full precision has {full}. Calibrated on {calibration['windows']} windows (unless varied) of "
        f"{calibration['window_length']} tokens of {Path(calibration['text']).name}. The best of a study is bold. The "
        "last column is the paper's Table 4, another model on another protocol: compare directions, not figures.\n\n"
        + markdown_table(head, lines, left=2)
        + "\n"
    )


def _chosen(studies: Sequence[str]) -> list[Variant]:
    rows = variants()
    for study in studies:
        if not any(row.study.startswith(study) for row in rows):
            known = ", ".join(dict.fromkeys(row.study.partition(",")[0] for row in rows))
            raise ConfigError(f"study {study!r} is unknown; choose from {known}")
    return [row for row in rows if not studies or any(row.study.startswith(study) for study in studies)]


def _figures(protocol: Protocol, pieces: Pieces, steps: dict[str, Any]) -> dict[str, Any]:
    names = ("true_bits", "nominal_bits", "output_error", "seconds", "peak_memory_bytes")
    figures = {name: steps["quantize"][name] for name in names if name in steps["quantize"]}
    return figures | {"perplexity": perplexities(protocol, pieces, steps)}


def _published(variant: Variant) -> float | None:
    file = resources.files("arbllm.evaluation").joinpath("page", "published.json")
    table = dict(json.loads(file.read_text(encoding="utf-8"))["ablation"]["rows"])
    return None if variant.published is None else float(table[variant.published])
