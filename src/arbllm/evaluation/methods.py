"""What `arbllm compare` can run, by name, and what each makes of a model.

| name | |
| --- | --- |
| `fp16` | the model as it is |
| `billm` | BiLLM, with its three zones |
| `arb`, `arb-x`, `arb-rc` | the paper's, with its column-group bitmap |
| `arb-rcx`, `arb-rcx-2.25` | with a budget of true bits, tuned by block; `-untuned` or `-distilled` may follow |
| `rtn-4`, `gptq-3`, `gptq-act-order-3`, `hqq-2` | peers, see `arbllm.evaluation.peers` |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arbllm.binarize.methods import METHODS
from arbllm.config import DEFAULT_BITS, BinarizationConfig
from arbllm.distillation import distill
from arbllm.errors import ConfigError
from arbllm.evaluation.peers import dense_parts, find_peer, peer_names, quantize_peer
from arbllm.format.report import report
from arbllm.model.events import OnEvent
from arbllm.model.source import open_model_only
from arbllm.pipeline import quantize
from arbllm.summary import JobSummary

FULL = "fp16"
JOINT = "arb-rcx"
DISTILLED = "-distilled"
DISTILLATION_STEPS = 384
# Parts of a file that pictures and tables tell apart, and the tensors of packed linears that fall under them.
PARTS = {
    "codes": (),
    "signs": ("signs",),
    "second signs": ("second_signs",),
    "bitmaps": ("group_bitmap", "column_bitmap", "column_order"),
    "scales": ("row_scales", "row_means", "column_scales"),
    "embeddings": (),
    "rest": (),
}


@dataclass(frozen=True)
class Calibration:
    """How every method of a comparison is calibrated; see `arbllm.quantize`.

    Attributes:
        distill_windows: windows of the text that distillations read; None for as many as calibrate.
    """

    text: str = "c4"
    windows: int = 128
    window_length: int = 2048
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    distill_windows: int | None = None

    def options(self) -> dict[str, Any]:
        """As `arbllm.quantize` names them."""
        return {
            "calibration": self.text,
            "windows": self.windows,
            "window_length": self.window_length,
            "seed": self.seed,
            "overwrite": True,
            **self.place(),
        }

    def place(self) -> dict[str, Any]:
        """Those of its options that evaluation has as well."""
        return {"device": self.device, "dtype": self.dtype, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class Recipe:
    """A method by name, resolved.

    Attributes:
        name: as asked for.
        config: of a binarization; None for another method.
        tune: steps of tuning each block; None for the default.
        distill: steps of distillation.
    """

    name: str
    config: BinarizationConfig | None = None
    tune: int | None = None
    distill: int = 0

    @property
    def base(self) -> Recipe | None:
        """What a distillation begins with: the recipe without it. None where there is none."""
        return replace(self, name=self.name.removesuffix(DISTILLED), distill=0) if self.distill else None

    @property
    def is_peer(self) -> bool:
        """Whether it is none of our own."""
        return self.config is None and self.name != FULL

    @property
    def family(self) -> str:
        """The method without its bits."""
        if self.config:
            return self.config.method
        return self.name if self.name == FULL else self.name.rpartition("-")[0]


def is_known(name: str) -> bool:
    """Whether there is a method of this name."""
    try:
        find_recipe(name)
    except ConfigError:
        return False
    return True


def find_recipe(name: str) -> Recipe:
    """The method of this name.

    Raises:
        ConfigError: there is none; lists those there are.
    """
    if name == FULL:
        return Recipe(name)
    if name in METHODS and name != JOINT:
        return Recipe(name, BinarizationConfig(method=name, partition="column+group" if name == "billm" else "cgb"))
    if name == JOINT or name.startswith(f"{JOINT}-"):
        return _joint(name)
    try:
        find_peer(name)
    except ConfigError:
        known = (FULL, *METHODS, f"{JOINT}-{DEFAULT_BITS}", f"{JOINT}-{DEFAULT_BITS}-untuned", *peer_names())
        raise ConfigError(f"method {name!r} is unknown; choose from {', '.join(known)}") from None
    return Recipe(name)


def make(recipe: Recipe, model: str, out: Path, calibration: Calibration, on_event: OnEvent | None) -> dict[str, Any]:
    """Quantize `model` into the directory `out`, and what that gave, as plain values.

    Args:
        recipe: how; a distillation goes on from its base's checkpoint, which lies beside `out` under its name.
        model: a hub id, a local directory or a `.gguf` file.
        out: the directory to write.
        calibration: on what text.
        on_event: told of every step as it happens.

    Returns:
        `nominal_bits`, `true_bits`, `bytes` (the whole file), `parts` (bytes by the names of `PARTS`), `seconds`,
        `peak_memory_bytes`, `output_error` (mean) and `output_errors` (by linear); of `fp16` the sizes alone, and
        nothing is written. Seconds and memory of a distillation are its own.

    Raises:
        ArbllmError: see `arbllm.quantize`.
    """
    if recipe.name == FULL:
        return _as_it_is(model, calibration)
    if recipe.config is None:
        return _peer(recipe.name, model, out, calibration, on_event)
    options = calibration.options() | {"on_event": on_event}
    summary: JobSummary
    if recipe.base:
        del options["dtype"]  # it goes on in that of the checkpoint
        options["windows"] = calibration.windows if calibration.distill_windows is None else calibration.distill_windows
        summary = distill(out.with_name(recipe.base.name), out, model=model, steps=recipe.distill, **options)
    else:
        summary = quantize(model, out, config=recipe.config, tune=recipe.tune, **options)
    found = report(out, contents=False)
    stored = found.size.linears.parts
    parts = {part: sum(stored[tensor] for tensor in tensors) for part, tensors in PARTS.items()}
    parts |= {"embeddings": found.size.embeddings, "rest": summary.bytes_on_disk - sum(stored.values())}
    parts["rest"] -= found.size.embeddings
    return {
        "nominal_bits": summary.nominal_bits_per_weight,
        "true_bits": summary.true_bits_per_weight,
        "bytes": summary.bytes_on_disk,
        "parts": parts,
        "seconds": summary.seconds,
        "peak_memory_bytes": summary.peak_memory_bytes,
        "output_error": summary.output_error,
        "output_errors": {linear.name: linear.output_error for linear in found.linears},
    }


def _joint(name: str) -> Recipe:
    words = name.removeprefix(JOINT).split("-")[1:]
    tuning = {"untuned": (0, 0), DISTILLED[1:]: (None, DISTILLATION_STEPS)}
    tune, distill = tuning[words.pop()] if words and words[-1] in tuning else (None, 0)
    try:
        bits = float(words[0]) if words else DEFAULT_BITS
        if len(words) > 1:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"method {name!r} is unknown; write {JOINT}-BITS, {JOINT}-BITS-untuned or -distilled"
        ) from None
    return Recipe(name, BinarizationConfig(method=JOINT, bits=bits), tune, distill)


def _as_it_is(model: str, calibration: Calibration) -> dict[str, Any]:
    opened = open_model_only(model, calibration.dtype, trust_remote_code=calibration.trust_remote_code)
    everything, linears, embeddings = dense_parts(opened)
    bits = 8.0 * opened.dtype.itemsize
    return {
        "nominal_bits": bits,
        "true_bits": bits,
        "bytes": everything,
        "parts": _parts(linears, 0, embeddings, everything - linears - embeddings),
    }


def _peer(name: str, model: str, out: Path, calibration: Calibration, on_event: OnEvent | None) -> dict[str, Any]:
    summary = quantize_peer(model, out, name, on_event=on_event, **calibration.options())
    codes = round(summary.nominal_bits_per_weight * summary.weights / 8)
    others = summary.dense_bytes - summary.dense_linear_bytes
    return {
        "nominal_bits": summary.nominal_bits_per_weight,
        "true_bits": summary.true_bits_per_weight,
        "bytes": summary.bytes_on_disk,
        "parts": _parts(codes, summary.linear_bytes - codes, summary.embedding_bytes, others - summary.embedding_bytes),
        "seconds": summary.seconds,
        "peak_memory_bytes": summary.peak_memory_bytes,
        "output_error": summary.output_error,
        "output_errors": summary.output_errors,
    }


def _parts(codes: int, scales: int, embeddings: int, rest: int) -> dict[str, int]:
    """Bytes by part of a model whose weights are codes with scales and zeros, or plain numbers."""
    return dict.fromkeys(PARTS, 0) | {"codes": codes, "scales": scales, "embeddings": embeddings, "rest": rest}
