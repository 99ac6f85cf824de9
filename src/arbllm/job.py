"""A quantization job as every process of it does it, short of writing the checkpoint."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import arbllm
from arbllm.binarize.methods import get_method
from arbllm.config import BinarizationConfig
from arbllm.errors import ConfigError
from arbllm.format.checksum import checksum
from arbllm.format.coding import CSR, check_coding
from arbllm.model.distill import cut_pieces
from arbllm.model.embeddings import DENSE_BITS, check_embedding_bits, quantize_embeddings
from arbllm.model.events import LinearQuantized, OnEvent
from arbllm.model.quantize import quantize_model
from arbllm.model.ranks import Ranks
from arbllm.model.resume import Progress, fingerprint
from arbllm.model.source import open_model_only, open_tokenizer
from arbllm.model.stream import StreamedModel, can_stream
from arbllm.model.training import Tuning
from arbllm.sizes import bits_for_size, dense_sizes
from arbllm.text import calibration_windows


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A dense model on its way: embeddings rounded, linears still to be binarized.

    Attributes:
        model: the model.
        streamed: what reads its blocks and head, where they are streamed.
        tokenizer: its tokenizer.
        tokens: calibration windows, int64 (N, L).
        lessons: windows to distil on, int64 (M, L); those of the calibration, if no other number is asked for.
        config: method and options, the bits that lead to the size asked for among them.
        source: fingerprint of the model as it was stored.
        dense_bytes: bytes of its tensors then.
        dense_linear_bytes: of them, the linears.
    """

    model: PreTrainedModel
    streamed: StreamedModel | None
    tokenizer: PreTrainedTokenizerBase
    tokens: Tensor
    lessons: Tensor
    config: BinarizationConfig
    source: str
    dense_bytes: int
    dense_linear_bytes: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank does, with the options of `quantize`."""

    model: str
    config: BinarizationConfig
    embedding_bits: int
    bitmap: str
    size: int | None
    tuning: Tuning | None
    distill: int
    distill_windows: int | None
    calibration: str
    windows: int
    window_length: int
    seed: int
    device: torch.device
    dtype: str
    trust_remote_code: bool
    stream: bool
    offload: Path | None
    ranks: Ranks

    @property
    def facts(self) -> dict[str, Any]:
        """How it is calibrated, for config.json and the model card."""
        text = {
            "text": shown(self.calibration),
            "windows": self.windows,
            "window_length": self.window_length,
            "seed": self.seed,
        }
        other = self.distill and self.distill_windows not in (None, self.windows)
        return {
            "tune": self.tuning.steps if self.tuning else 0,
            "distill": self.distill,
            **text,
            **({"distillation": text | {"windows": self.distill_windows}} if other else {}),
        }

    def open(self) -> Opened:
        """Read the text and the model."""
        tokenizer = open_tokenizer(self.model, self.trust_remote_code)
        tokens = lessons = self._read(tokenizer, self.windows)
        self.ranks.share(tokens)  # what would fail later is better refused in the beginning
        if self.distill:
            if self.distill_windows is not None:
                lessons = self._read(tokenizer, self.distill_windows)
            cut_pieces(lessons)
        streamed = StreamedModel(self.model, self.dtype, self.trust_remote_code) if self.stream else None
        model = streamed.model if streamed else open_model_only(self.model, self.dtype, "cpu", self.trust_remote_code)
        source = streamed.fingerprint() if streamed else fingerprint(model.state_dict().items())
        self.ranks.check_same([source, versions()], "model or versions of libraries")
        dense_bytes, dense_linear_bytes = dense_sizes(model)
        if streamed and self.embedding_bits != DENSE_BITS:
            streamed.load_head()
        quantize_embeddings(model, self.embedding_bits)
        config = self.config
        if self.size is not None:
            config = replace(config, bits=bits_for_size(model, self.size))
        return Opened(
            model=model,
            streamed=streamed,
            tokenizer=tokenizer,
            tokens=tokens,
            lessons=lessons,
            config=config,
            source=source,
            dense_bytes=dense_bytes,
            dense_linear_bytes=dense_linear_bytes,
        )

    def _read(self, tokenizer: PreTrainedTokenizerBase, windows: int) -> Tensor:
        """So many windows of the calibration text, the same on all ranks."""
        text = self.calibration, tokenizer, windows, self.window_length, self.seed
        return self.ranks.told(partial(calibration_windows, *text))

    def manifest(self, opened: Opened) -> dict[str, Any]:
        """What the job is: with any of it changed, its finished blocks would be others."""
        # Embeddings and the way of storing count as options: with others, finished blocks are of no use.
        options = opened.config.to_dict() | {"embedding_bits": self.embedding_bits, "bitmap": self.bitmap} | self.facts
        options |= {"dtype": self.dtype, "device": self.device.type, "stream": self.stream}
        return {
            "versions": versions(),
            "model": opened.source,
            "calibration_tokens": checksum(opened.tokens),
            **({"distillation_tokens": checksum(opened.lessons)} if self.distill else {}),
            "options": options,
        }

    def binarize(
        self, opened: Opened, on_event: OnEvent | None = None, progress: Progress | None = None
    ) -> list[LinearQuantized]:
        """Binarize the model, in place."""
        results = quantize_model(
            opened.model,
            opened.tokens,
            opened.config,
            tuning=self.tuning,
            device=self.device,
            on_event=on_event,
            progress=progress,
            load_block=opened.streamed.load_block if opened.streamed else None,
            offload=self.offload,
            ranks=self.ranks,
        )
        if opened.streamed:
            opened.streamed.load_head()
        return results


def streamable(model: str, config: BinarizationConfig, distill: int) -> BinarizationConfig:
    """The options for a model that is streamed.

    Raises:
        ConfigError: it cannot be.
    """
    if not can_stream(model):
        raise ConfigError(f"stream is for a local directory with safetensors files, which {model} is not")
    return streamed_config(config, distill)


def streamed_config(config: BinarizationConfig, distill: int) -> BinarizationConfig:
    """The options without what needs the whole model in memory.

    Raises:
        ConfigError: a distillation is asked for, which does.
    """
    if distill:
        raise ConfigError("distill needs the dense model in memory; leave out stream, or distill")
    if config.bits is None or config.allocation == "uniform":
        return config
    message = "bits are divided uniformly, since what linears gain from them is measured on the whole model in memory"
    warnings.warn(message, stacklevel=1)
    return replace(config, allocation="uniform")


def check_choices(
    config: BinarizationConfig,
    embedding_bits: int,
    bitmap: str,
    size: int | None,
    distill: int,
    distill_windows: int | None,
) -> None:
    """Refuse options of `quantize` that do not go together, or make no difference.

    Raises:
        ConfigError: names the option and the remedy.
    """
    config.check_options()
    check_embedding_bits(embedding_bits)
    check_coding(bitmap)
    if size is not None and not get_method(config.method).joint:
        raise ConfigError(f"size cannot be chosen with method {config.method!r}; choose arb-rcx, or leave it out")
    if distill_windows is not None and not distill:
        raise ConfigError("distill_windows is of no use without distill; leave it out, or say how many steps")
    if size is not None and bitmap == CSR:
        raise ConfigError("size cannot be kept with bitmap 'csr', which takes more than the raw bitmap; choose entropy")


def choose_tuning(config: BinarizationConfig, tune: int | None, distill: int) -> Tuning | None:
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


def shown(text: str) -> str:
    """A text as checkpoints name it: a file by its name alone."""
    return Path(text).name if Path(text).is_file() else text


def versions() -> dict[str, str]:
    """What computes; with other versions the numbers may be others."""
    return {"arbllm": arbllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
