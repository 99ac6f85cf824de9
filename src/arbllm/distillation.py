"""A packed checkpoint in, the same with its scales distilled out: for what `quantize` was not asked to do."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import arbllm
from arbllm.card import CardFacts, model_card
from arbllm.config import BinarizationConfig
from arbllm.device import check_disk_space, choose_device, naming_lack_of_memory
from arbllm.embedding import Int8Embedding
from arbllm.errors import ConfigError, ModelError
from arbllm.experts import split_experts
from arbllm.format.checkpoint import open_checkpoint
from arbllm.format.checksum import canonical_checksum, checksum
from arbllm.format.output import output_path
from arbllm.format.report import CheckpointReport, report
from arbllm.format.rows import quantize_rows
from arbllm.integrations.auto import auto_class
from arbllm.job import choose_tuning, shown, versions
from arbllm.measure import Measurement, Meter
from arbllm.model.distill import distill_model, distillation_rate
from arbllm.model.events import DistillationFinished, Event, OnEvent
from arbllm.model.quantize import check_length
from arbllm.model.resume import Progress, fingerprint, resumable_output
from arbllm.model.source import open_config, open_model, open_model_only
from arbllm.model.training import Tuning
from arbllm.nn import BinaryLinear
from arbllm.pipeline import CARD_FILE, LOG_FILE, both, save_packed
from arbllm.progress import JsonLinesLog
from arbllm.sizes import dense_sizes
from arbllm.summary import JobSummary
from arbllm.text import NAMES, calibration_windows

DISTILLATION_LOG_FILE = "distillation_log.jsonl"


@dataclass(frozen=True, kw_only=True)
class DistillationSummary(JobSummary):
    """What a distillation made of a packed checkpoint: another one.

    Attributes:
        divergence_before: from the dense model's predictions, in nats a token, on held-out text; the mean.
        divergence_after: likewise, of what was kept.
        steps: after how many steps that was.
    """

    divergence_before: float
    divergence_after: float
    steps: int


def distill(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    steps: int = 128,
    calibration: str | None = None,
    windows: int | None = None,
    window_length: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
) -> DistillationSummary:
    """Distil the scales and norms of a packed checkpoint from the model that it was quantized from.

    It does what `quantize(..., distill=steps)` does in the end, for a checkpoint that is there already: to try how many
    steps pay, or to go on where the loss still fell. Signs, groups and the size stay as they are.

    >>> arbllm.distill("smollm2-packed", "smollm2-distilled", model="HuggingFaceTB/SmolLM2-135M", steps=256)

    Args:
        checkpoint: directory of a packed checkpoint by arb-rc or arb-rcx.
        out: the directory to write; it appears whole or not at all. A job that was stopped goes on where it was a
            minute before when it is called again with the same arguments.
        model: what it was quantized from: a hub id, a local directory or a `.gguf` file.
        steps: of Adam, one piece of 512 tokens each.
        calibration: the text, as in `quantize`; None, as for the rest, for what the checkpoint was calibrated on.
        windows: how many windows.
        window_length: tokens of a window.
        seed: of the choice of windows.
        device: where to compute; None for the GPU where there is one.
        trust_remote_code: run model code that comes with the checkpoints.
        overwrite: replace an existing `out`, and drop what another job for it left unfinished.
        on_event: told of every step as it happens.

    Raises:
        ArbllmError: the checkpoint is damaged or of another method, `model` is not what it was made of, or the text,
            the options or the disk do not allow it.
    """
    checkpoint, out, model = Path(checkpoint).expanduser(), output_path(out, checkpoint, model), str(model)
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    place, before = choose_device(device), report(checkpoint)
    choose_tuning(BinarizationConfig.from_dict(before.binarization), 0, steps)
    text = _text(before, {"text": calibration, "windows": windows, "window_length": window_length, "seed": seed})
    job = _Job(checkpoint, before, model, steps, text, place, trust_remote_code, overwrite)
    with naming_lack_of_memory(), resumable_output(out, overwrite) as (kept, work):
        check_disk_space(before.bytes_on_disk, work)
        finished, cost, dense_bytes, dense_linear_bytes = job.run(kept, work, on_event)
        after = report(work, contents=False)
        linears = after.size.linears
        summary = DistillationSummary(
            path=out,
            linears=len(after.linears),
            weights=linears.weights,
            true_bits_per_weight=linears.true_bits,
            nominal_bits_per_weight=linears.nominal_bits,
            output_error=after.output_error or 0.0,
            bytes_on_disk=after.bytes_on_disk,
            linear_bytes=linears.nbytes,
            dense_bytes=dense_bytes,
            dense_linear_bytes=dense_linear_bytes,
            divergence_before=finished.before,
            divergence_after=finished.after,
            steps=finished.steps,
            **asdict(cost),
        )
        auto = auto_class(open_config(str(work), trust_remote_code)).__name__
        (work / CARD_FILE).write_text(_card(model, summary, after, auto), encoding="utf-8")
    return summary


@dataclass(frozen=True)
class _Job:
    """The options of `distill`, resolved."""

    checkpoint: Path
    before: CheckpointReport
    model: str
    steps: int
    text: dict[str, Any]
    device: torch.device
    trust_remote_code: bool
    overwrite: bool

    def run(
        self, kept: Path, work: Path, on_event: OnEvent | None
    ) -> tuple[DistillationFinished, Measurement, int, int]:
        """Distil, and write all but the card; how that ended, its cost, and the dense model's sizes (`dense_sizes`)."""
        meter = Meter(self.device)
        packed, tokenizer = open_model(str(self.checkpoint), trust_remote_code=self.trust_remote_code)
        windows, length, seed = (self.text[name] for name in ("windows", "window_length", "seed"))
        check_length(packed.config, length)
        tokens = calibration_windows(self.text["text"], tokenizer, windows, length, seed)
        teacher = [_open_dense(self.model, self.checkpoint, packed, self.trust_remote_code)]
        sizes = dense_sizes(teacher[0])
        progress = Progress(kept, self._manifest(teacher[0], tokens), self.overwrite, meter)
        events: list[Event] = []
        with JsonLinesLog(work / DISTILLATION_LOG_FILE) as log:
            emit, tuning = both(log, both(events.append, on_event)), Tuning(self.steps, distillation_rate(self.steps))
            distill_model(packed, teacher.pop, tokens, tuning, self.device, emit, progress)  # popped: to be let go
        save_packed(packed, tokenizer, self.checkpoint, work, _facts(self.checkpoint, self.text, self.steps))
        if (self.checkpoint / LOG_FILE).exists():
            shutil.copy(self.checkpoint / LOG_FILE, work)
        assert isinstance(events[-1], DistillationFinished), "the last event of a distillation is its end"
        return events[-1], progress.cost(), *sizes

    def _manifest(self, dense: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
        """What the job is: with any of it changed, what was learnt would be something else."""
        return {
            "versions": versions(),
            "checkpoint": canonical_checksum(open_checkpoint(self.checkpoint).checksums),
            "model": fingerprint(dense.state_dict().items()),
            "calibration_tokens": checksum(tokens),
            "options": {"steps": self.steps, "device": self.device.type},
        }


def _text(before: CheckpointReport, asked: dict[str, Any]) -> dict[str, Any]:
    """The calibration text: what was asked for, and otherwise as the checkpoint tells.

    Raises:
        ConfigError: the checkpoint tells a file's name alone, or nothing.
    """
    text = before.calibration | {name: value for name, value in asked.items() if value is not None}
    if missing := [name for name in asked if name not in text]:
        raise ConfigError(f"{before.path} does not tell its calibration; give {', '.join(missing)}")
    if asked["text"] is None and text["text"] not in NAMES:
        raise ConfigError(f"{before.path} was calibrated on a file, {text['text']}; give its path as calibration")
    return text


def _open_dense(model: str, checkpoint: Path, packed: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """The dense model.

    Raises:
        ModelError: it is not what the packed one was made of; names the first linear that differs.
    """
    # A GGUF file is opened in whatever dtype; others as they are stored, of which packed ones may be rounded.
    dtype = str(packed.dtype).removeprefix("torch.") if Path(model).suffix == ".gguf" else "auto"
    dense = open_model_only(model, dtype, trust_remote_code=trust_remote_code)
    split_experts(dense)  # as the packed one has them
    modules = dict(dense.named_modules())
    for name, module in packed.named_modules():
        if isinstance(module, BinaryLinear):
            shape = (module.layout.rows, module.layout.columns)
            weight = getattr(modules.get(name), "weight", None)
            if weight is None or tuple(weight.T.shape if module.transposed else weight.shape) != shape:
                raise ModelError(
                    f"{model} has no linear {name} of {shape[0]} x {shape[1]} dense weights, as {checkpoint} has; "
                    "give the model that it was quantized from"
                )
    if (found := _vocabulary(dense)) != (wanted := _vocabulary(packed)):
        message = f"{model} has {found} tokens, {checkpoint} {wanted}; give the model that it was quantized from"
        raise ModelError(message)
    if not _same_embeddings(dense, packed):
        message = f"embeddings of {model} are not those of {checkpoint}; give the model that it was quantized from"
        raise ModelError(message)
    return dense


def _same_embeddings(dense: PreTrainedModel, packed: PreTrainedModel) -> bool:
    """Quantization leaves embeddings as they are, or rounds them in one way: they tell one model from another."""
    weight, embedding = dense.get_input_embeddings().weight.detach(), packed.get_input_embeddings()
    if isinstance(embedding, Int8Embedding):
        codes, scales = quantize_rows(weight)  # perhaps of weights in another dtype than those that were rounded
        near = (codes.int() - embedding.get_buffer("codes").int()).abs() <= 1
        return bool(near.all()) and torch.allclose(scales, embedding.get_buffer("scales"), rtol=0.01)
    return torch.equal(weight.to(embedding.weight.dtype), embedding.weight)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _facts(checkpoint: Path, text: dict[str, Any], steps: int) -> dict[str, Any]:
    """`quantization_config` as it was, with the steps of all distillations, the last one's text if another."""
    facts = open_checkpoint(checkpoint).quantization
    calibration = {key: value for key, value in facts.get("calibration", {}).items() if key != "distillation"}
    now = {"text": shown(text["text"]), **{name: text[name] for name in ("windows", "window_length", "seed")}}
    further = {} if now.items() <= calibration.items() else {"distillation": now}
    return {**facts, "calibration": {**calibration, **further, "distill": calibration.get("distill", 0) + steps}}


def _card(model: str, summary: DistillationSummary, after: CheckpointReport, auto: str) -> str:
    facts = CardFacts(
        name=summary.path.absolute().name,
        source=model,
        version=arbllm.__version__,
        config=BinarizationConfig.from_dict(after.binarization),
        embedding_bits=8 if after.rounded_embeddings else 16,
        calibration=after.calibration,
        true_bits=summary.true_bits_per_weight,
        nominal_bits=summary.nominal_bits_per_weight,
        bytes_on_disk=summary.bytes_on_disk,
        output_error=summary.output_error,
        auto=auto,
    )
    return model_card(facts)
