"""A model by name in, a packed checkpoint out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import arbllm
from arbllm.binarize.methods import get_method
from arbllm.card import CardFacts, model_card
from arbllm.config import BinarizationConfig
from arbllm.device import check_disk_space, choose_device, evaluation_dtype
from arbllm.errors import ConfigError
from arbllm.evaluation.measure import measure
from arbllm.evaluation.perplexity import DEFAULT_CONTEXT, Perplexity, cut_windows, longest_context, perplexity
from arbllm.format.checkpoint import bytes_on_disk, checksum, open_checkpoint
from arbllm.format.coding import CSR, RAW, check_coding
from arbllm.format.header import order_metadata
from arbllm.integrations.transformers import mark_packed
from arbllm.model.distill import DISTILLATION_RATE, cut_pieces, distill_model
from arbllm.model.embeddings import check_embedding_bits, quantize_embeddings
from arbllm.model.events import Event, LinearQuantized, OnEvent
from arbllm.model.quantize import quantize_model
from arbllm.model.resume import Progress, fingerprint, resumable_output
from arbllm.model.source import open_model, open_model_only, open_tokenizer
from arbllm.model.stream import StreamedModel, can_stream
from arbllm.model.tune import Tuning
from arbllm.progress import JsonLinesLog
from arbllm.sizes import bits_for_size, dense_sizes, largest_size
from arbllm.summary import JobSummary
from arbllm.text import calibration_windows, evaluation_tokens

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
    size: int | None = None,
    tune: int | None = None,
    distill: int = 0,
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
    was when it is called again with the same arguments (see `arbllm.model.resume`).

    Args:
        model: a hub id, a local directory or a `.gguf` file.
        out: the directory to write.
        config: method and options.
        embedding_bits: 8 to round embeddings and head to 8 bits with one scale a row, 16 to leave them as they are.
        bitmap: how the files hold group bitmaps, losslessly: `raw`, `entropy` (a range coder, smaller) or `csr` (as the
            paper names it, but larger unless one weight in 16 or fewer is in the rarer group). In memory it is raw.
        size: bytes that the checkpoint's weight files may take in all; it takes the place of `config.bits`.
        tune: Adam steps on each block's scales and norms after it is solved, 0 for none; None means 40 with arb-rcx,
            else none.
        distill: steps of end-to-end distillation of all scales and norms in the end, 0 for none. It takes the dense and
            the packed model in memory together.
        calibration: c4, wikitext2, ptb, a text file, or `builtin`, which needs no network.
        windows: calibration windows.
        window_length: tokens of a window.
        seed: of the choice of windows.
        device: where to compute, one decoder block at a time; None for the GPU where there is one.
        dtype: to open the model in; `auto` as it is stored.
        trust_remote_code: run model code that comes with the checkpoint.
        overwrite: replace an existing `out`, and start again where work is unfinished.
        stream: read the model's weights one decoder block at a time, so that it need not fit in memory: a local
            directory with safetensors files. Bits are then divided uniformly.
        offload_dir: a directory for a memory-mapped file of the calibration windows' activations.
        evaluate: afterwards, measure the checkpoint's perplexity on this text, for the model card.
        on_event: told of every step as it happens.

    Raises:
        ArbllmError: the model, the text, the options or the disk do not allow it; found before the work begins where
            that can be known.
    """
    model, out, config = str(model), Path(out), config or BinarizationConfig()
    place = choose_device(device)
    tuning = _tuning(config, tune, distill)
    if stream:
        config = _streamable(model, config, distill)
    check_embedding_bits(embedding_bits)
    check_coding(bitmap)
    if size is not None and bitmap == CSR:
        raise ConfigError("size cannot be kept with bitmap 'csr', which takes more than the raw bitmap; choose entropy")
    if Path(model).exists() and Path(model).resolve() == out.resolve():
        raise ConfigError(f"{out} is the model itself; choose another output directory")
    facts: dict[str, str | int] = {
        "tune": tuning.steps if tuning else 0,
        "distill": distill,
        "text": _shown(calibration),
        "windows": windows,
        "window_length": window_length,
        "seed": seed,
    }
    with resumable_output(out, overwrite) as (kept, work):
        with measure() as measured:
            tokenizer = open_tokenizer(model, trust_remote_code)
            tokens = calibration_windows(calibration, tokenizer, windows, window_length, seed)
            if distill:
                cut_pieces(tokens)  # what would fail in the end is better refused in the beginning
            streamed = StreamedModel(model, dtype, trust_remote_code) if stream else None
            opened = streamed.model if streamed else open_model_only(model, dtype, trust_remote_code=trust_remote_code)
            held_out = _held_out(opened, evaluate, tokenizer) if evaluate else None
            dense_bytes, dense_linear_bytes = dense_sizes(opened)
            source = streamed.fingerprint() if streamed else fingerprint(opened.state_dict().items())
            quantize_embeddings(opened, embedding_bits)
            if size is not None:
                config = replace(config, bits=bits_for_size(opened, size))
            check_disk_space(largest_size(opened, config, bitmap), work)
            # Embeddings and the way of storing count as options: with others, finished blocks are of no use.
            options = config.to_dict() | {"embedding_bits": embedding_bits, "bitmap": bitmap} | facts
            options |= {"dtype": dtype, "device": place.type, "stream": stream}
            progress = Progress(kept, _manifest(source, tokens, options))
            with JsonLinesLog(work / LOG_FILE) as log:
                emit = _both(log, on_event)
                results = quantize_model(
                    opened,
                    tokens,
                    config,
                    tuning=tuning,
                    device=place,
                    on_event=emit,
                    progress=progress,
                    load_block=streamed.load_block if streamed else None,
                    offload=Path(offload_dir) if offload_dir else None,
                )
                if distill:
                    _distill(opened, model, trust_remote_code, tokens, distill, place, emit, progress)
            _save(opened, tokenizer, work, config, bitmap, results, facts)
        del opened
        packed = open_checkpoint(work).size.linears
        score = _evaluate(work, held_out, place) if held_out is not None else None
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
            **asdict(measured),
        )
        (work / CARD_FILE).write_text(
            _card(model, summary, config, embedding_bits, facts, evaluate, score), encoding="utf-8"
        )
    return summary


def _streamable(model: str, config: BinarizationConfig, distill: int) -> BinarizationConfig:
    """The options for a model that is streamed.

    Raises:
        ConfigError: it cannot be.
    """
    if not can_stream(model):
        raise ConfigError(f"stream is for a local directory with safetensors files, which {model} is not")
    if distill:
        raise ConfigError("distill needs the dense model in memory; leave out stream, or distill")
    if config.bits is None or config.allocation == "uniform":
        return config
    message = "bits are divided uniformly, since what linears gain from them is measured on the whole model in memory"
    warnings.warn(message, stacklevel=1)
    return replace(config, allocation="uniform")


def _manifest(source: str, tokens: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a job is: with any of it changed, its finished blocks would be others."""
    versions = {"arbllm": arbllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": versions, "model": source, "calibration_tokens": checksum(tokens), "options": dict(options)}


def _distill(
    model: PreTrainedModel,
    source: str,
    trust_remote_code: bool,
    tokens: Tensor,
    steps: int,
    device: torch.device,
    emit: Callable[[Event], None],
    progress: Progress,
) -> None:
    """Distil from the model called `source`, unless that was done before."""
    done = progress.restore_distilled(model)
    if done is not None:
        emit(done)
        return
    events: list[Event] = []
    teacher = open_model_only(source, trust_remote_code=trust_remote_code)
    distill_model(model, teacher, tokens, Tuning(steps, DISTILLATION_RATE), device, _both(events.append, emit))
    progress.keep_distilled(model, events[-1])


def _tuning(config: BinarizationConfig, tune: int | None, distill: int) -> Tuning | None:
    """How blocks are tuned, None for not at all.

    Raises:
        ConfigError: steps are negative, or the method cannot be tuned.
    """
    method = get_method(config.method)
    for option, steps in (("tune", tune or 0), ("distill", distill)):
        if steps < 0:
            raise ConfigError(f"{option} must be a number of steps, 0 for none, not {steps}")
        if steps and (method.has_means or not method.has_column_scales):
            raise ConfigError(f"{option} is for arb-rc and arb-rcx; {config.method} has no column scales to tune")
    if tune is None:
        tune = Tuning().steps if method.joint else 0
    return Tuning(tune) if tune else None


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    config: BinarizationConfig,
    bitmap: str,
    results: list[LinearQuantized],
    calibration: Mapping[str, str | int],
) -> None:
    """Write weights, config.json and tokenizer."""
    statistics = {
        result.name: {"output_error": result.output_error, "weight_error": result.weight_error} for result in results
    }
    facts = {"binarization": config.to_dict(), "statistics": statistics, "calibration": dict(calibration)}
    mark_packed(model, facts | {"bitmap": bitmap})
    model.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        order_metadata(file)
    tokenizer.save_pretrained(directory)


def _held_out(model: PreTrainedModel, text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The windows to evaluate on in the end; text that does not allow it is better refused in the beginning."""
    return cut_windows(model, evaluation_tokens(text, tokenizer), min(DEFAULT_CONTEXT, longest_context(model)))


def _evaluate(checkpoint: Path, held_out: Tensor, device: torch.device) -> Perplexity:
    """Perplexity of the checkpoint as it lies on the disk, on windows (N, L)."""
    model, _ = open_model(str(checkpoint), dtype=evaluation_dtype("auto", device), device=device)
    return perplexity(model, held_out.flatten(), held_out.shape[1])


def _card(
    source: str,
    summary: QuantizationSummary,
    config: BinarizationConfig,
    embedding_bits: int,
    calibration: Mapping[str, str | int],
    text: str | None,
    score: Perplexity | None,
) -> str:
    facts = CardFacts(
        name=summary.path.absolute().name,
        source=source,
        version=arbllm.__version__,
        config=config,
        embedding_bits=embedding_bits,
        calibration=calibration,
        true_bits=summary.true_bits_per_weight,
        nominal_bits=summary.nominal_bits_per_weight,
        bytes_on_disk=summary.bytes_on_disk,
        output_error=summary.output_error,
        perplexity={_shown(text): (score.perplexity, score.context)} if text and score else {},
    )
    return model_card(facts)


def _both(first: Callable[[Event], None], second: OnEvent | None) -> OnEvent:
    def emit(event: Event) -> None:
        first(event)
        if second:
            second(event)

    return emit


def _shown(text: str) -> str:
    """A text as checkpoints name it: a file by its name alone."""
    return Path(text).name if Path(text).is_file() else text
