"""A model by name in, a packed checkpoint out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import arbllm
from arbllm.card import CardFacts, model_card
from arbllm.config import BinarizationConfig
from arbllm.device import check_disk_space, choose_device, evaluation_dtype, naming_lack_of_memory
from arbllm.format.checkpoint import bytes_on_disk, open_checkpoint
from arbllm.format.coding import RAW
from arbllm.format.header import order_metadata
from arbllm.format.output import output_path
from arbllm.integrations.auto import auto_class
from arbllm.integrations.transformers import mark_packed
from arbllm.job import Job, check_choices, choose_tuning, shown, streamable
from arbllm.measure import Meter
from arbllm.model.distill import distill_model, distillation_rate
from arbllm.model.events import Event, LinearQuantized, OnEvent
from arbllm.model.perplexity import DEFAULT_CONTEXT, Perplexity, cut_windows, longest_context, perplexity
from arbllm.model.ranks import joined, own_device
from arbllm.model.resume import Progress, resumable_output
from arbllm.model.source import open_config, open_model, open_model_only, save_tokenizer
from arbllm.model.training import Tuning
from arbllm.progress import JsonLinesLog
from arbllm.sizes import largest_size, size_in_bytes
from arbllm.summary import JobSummary
from arbllm.text import evaluation_tokens

LOG_FILE = "quantization_log.jsonl"
CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True)
class QuantizationSummary(JobSummary):
    """What a finished job made of a model: a packed checkpoint.

    Attributes:
        perplexity: of the checkpoint on the text asked for; None where none was.
    """

    perplexity: float | None = None


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    config: BinarizationConfig | None = None,
    embedding_bits: int = 16,
    bitmap: str = RAW,
    size: int | str | None = None,
    tune: int | None = None,
    distill: int = 0,
    distill_windows: int | None = None,
    calibration: str = "c4",
    windows: int = 128,
    window_length: int = 2048,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    stream: bool = False,
    offload_dir: str | Path | None = None,
    evaluate: str | None = None,
    on_event: OnEvent | None = None,
) -> QuantizationSummary:
    """Binarize a model and write it as a packed checkpoint.

    >>> arbllm.quantize("HuggingFaceTB/SmolLM2-135M", "smollm2-packed", calibration="builtin", windows=16)
    >>> model = arbllm.load("smollm2-packed")

    `out` receives the weights, the tokenizer, a model card and `quantization_log.jsonl`, one line for each event
    (see `arbllm.model.events`). It appears whole or not at all. A job that was stopped in whatever way goes on where it
    was when it is called again with the same arguments (see `arbllm.model.resume`). Under `torchrun`, each process
    calls this function, and all do the job together (see `arbllm.model.ranks`); rank 0 alone writes.

    Args:
        model: a hub id, a local directory or a `.gguf` file.
        out: the directory to write.
        config: method and options.
        embedding_bits: 8 to round embeddings and head to 8 bits with one scale a row, 16 to leave them as they are.
        bitmap: how the files hold group bitmaps, losslessly: `raw`, `entropy` (a range coder, smaller) or `csr` (as the
            paper names it, but larger unless one weight in 16 or fewer is in the rarer group). In memory it is raw.
        size: what the checkpoint's weight files may take in all, in bytes or as in "1.8GB"; it takes the place of
            `config.bits`.
        tune: Adam steps on each block's scales and norms after it is solved, 0 for none; None means 40 with arb-rcx,
            else none.
        distill: steps of end-to-end distillation of all scales and norms in the end, 0 for none. The dense model reads
            the calibration text first, the packed one in memory beside it.
        distill_windows: windows of the calibration text to distil on; None for as many as for calibration. Scales of a
            whole model can learn from more text than Hessians need.
        calibration: c4, wikitext2, ptb, a text file, or `builtin`, which needs no network.
        windows: calibration windows.
        window_length: tokens of a window.
        seed: of the choice of windows.
        device: where to compute, one decoder block at a time; None for the GPU where there is one.
        dtype: to open the model in; `auto` as it is stored.
        trust_remote_code: run model code that comes with the checkpoint.
        overwrite: replace an existing `out`, and drop what another job for it left unfinished.
        stream: read the model's weights one decoder block at a time, so that it need not fit in memory: a local
            directory with safetensors files. Bits are then divided uniformly.
        offload_dir: a directory for a memory-mapped file of the calibration windows' activations.
        evaluate: afterwards, measure the checkpoint's perplexity on this text, for the model card.
        on_event: told of every step as it happens.

    Raises:
        ArbllmError: the model, the text, the options or the disk do not allow it; found before the work begins where
            that can be known.
    """
    model, out, config = str(model), output_path(out, model), config or BinarizationConfig()
    largest = None if size is None else size_in_bytes(size)
    check_choices(config, embedding_bits, bitmap, largest, distill, distill_windows)
    place = own_device(choose_device(device))
    tuning = choose_tuning(config, tune, distill)
    if stream:
        config = streamable(model, config, distill)
    if evaluate and Path(evaluate).is_file() and Path(evaluate).resolve() == Path(calibration).resolve():
        warnings.warn(f"perplexity on {evaluate} will flatter: it is the text of the calibration, too", stacklevel=2)
    with naming_lack_of_memory(), joined(place) as ranks:
        job = Job(
            model=model,
            config=config,
            embedding_bits=embedding_bits,
            bitmap=bitmap,
            size=largest,
            tuning=tuning,
            distill=distill,
            distill_windows=distill_windows,
            calibration=calibration,
            windows=windows,
            window_length=window_length,
            seed=seed,
            device=place,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            stream=stream,
            offload=Path(offload_dir) if offload_dir else None,
            ranks=ranks,
        )
        if not ranks.first:
            job.binarize(job.open())
        return ranks.told(partial(_write, job, out, overwrite, evaluate, on_event))


def _write(job: Job, out: Path, overwrite: bool, evaluate: str | None, on_event: OnEvent | None) -> QuantizationSummary:
    """What rank 0 does: the job, and a checkpoint of it."""
    with resumable_output(out, overwrite) as (kept, work):
        meter = Meter(job.device)
        opened = job.open()
        model, config = opened.model, opened.config
        held_out = _held_out(model, evaluate, opened.tokenizer) if evaluate else None
        check_disk_space(largest_size(model, config, job.bitmap), work)
        progress = Progress(kept, job.manifest(opened), overwrite, meter)
        with JsonLinesLog(work / LOG_FILE) as log:
            emit = both(log, on_event)
            results = job.binarize(opened, emit, progress)
            if job.distill:
                _distill(model, job, opened.lessons, emit, progress)
        save_packed(model, opened.tokenizer, job.model, work, _facts(job, config, results))
        cost = progress.cost()
        dense_bytes, dense_linear_bytes = opened.dense_bytes, opened.dense_linear_bytes
        del opened, model
        packed = open_checkpoint(work).size.linears
        score = _evaluate(work, held_out, job) if held_out is not None else None
        summary = QuantizationSummary(
            path=out,
            linears=len(results),
            weights=packed.weights,
            true_bits_per_weight=packed.true_bits,
            nominal_bits_per_weight=packed.nominal_bits,
            output_error=mean(result.output_error for result in results),
            bytes_on_disk=bytes_on_disk(work),
            linear_bytes=packed.nbytes,
            dense_bytes=dense_bytes,
            dense_linear_bytes=dense_linear_bytes,
            perplexity=score.perplexity if score else None,
            **asdict(cost),
        )
        auto = auto_class(open_config(str(work), job.trust_remote_code)).__name__
        (work / CARD_FILE).write_text(_card(job, summary, config, auto, evaluate, score), encoding="utf-8")
    return summary


def _distill(
    model: PreTrainedModel, job: Job, tokens: Tensor, emit: Callable[[Event], None], progress: Progress
) -> None:
    """Distil from the dense model, unless that was done before."""
    done = progress.restore_distilled(model)
    if done is not None:
        emit(done)
        return
    events: list[Event] = []
    open_teacher = partial(open_model_only, job.model, job.dtype, trust_remote_code=job.trust_remote_code)
    tuning = Tuning(job.distill, distillation_rate(job.distill))
    distill_model(model, open_teacher, tokens, tuning, job.device, both(events.append, emit), progress)
    progress.keep_distilled(model, events[-1])


def save_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    directory: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write weights, config.json, with facts as `mark_packed` takes them, and tokenizer as `save_tokenizer` does."""
    mark_packed(model, facts)
    model.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        order_metadata(file)
    save_tokenizer(tokenizer, source, directory)


def both(first: Callable[[Event], None], second: OnEvent | None) -> OnEvent:
    """Tell two of every event, or only the first where there is no second."""

    def emit(event: Event) -> None:
        first(event)
        if second:
            second(event)

    return emit


def _facts(job: Job, config: BinarizationConfig, results: list[LinearQuantized]) -> dict[str, Any]:
    """What config.json tells of the quantization."""
    statistics = {
        result.name: {"output_error": result.output_error, "weight_error": result.weight_error} for result in results
    }
    facts = {"binarization": config.to_dict(), "statistics": statistics, "calibration": job.facts}
    return facts | {"bitmap": job.bitmap}


def _held_out(model: PreTrainedModel, text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The windows to evaluate on in the end; text that does not allow it is better refused in the beginning."""
    return cut_windows(model, evaluation_tokens(text, tokenizer), min(DEFAULT_CONTEXT, longest_context(model.config)))


def _evaluate(checkpoint: Path, held_out: Tensor, job: Job) -> Perplexity:
    """Perplexity of the checkpoint as it lies on the disk, on windows (N, L)."""
    dtype = evaluation_dtype("auto", job.device)
    model, _ = open_model(str(checkpoint), dtype=dtype, device=job.device, trust_remote_code=job.trust_remote_code)
    return perplexity(model, held_out.flatten(), held_out.shape[1])


def _card(
    job: Job,
    summary: QuantizationSummary,
    config: BinarizationConfig,
    auto: str,
    text: str | None,
    score: Perplexity | None,
) -> str:
    facts = CardFacts(
        name=summary.path.absolute().name,
        source=job.model,
        version=arbllm.__version__,
        config=config,
        embedding_bits=job.embedding_bits,
        calibration=job.facts,
        true_bits=summary.true_bits_per_weight,
        nominal_bits=summary.nominal_bits_per_weight,
        bytes_on_disk=summary.bytes_on_disk,
        output_error=summary.output_error,
        perplexity={shown(text): (score.perplexity, score.context)} if text and score else {},
        auto=auto,
    )
    return model_card(facts)
