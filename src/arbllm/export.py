"""A packed checkpoint, or a GGUF file, to an ordinary one, for engines that know nothing of packed weights."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from arbllm.device import check_disk_space
from arbllm.format.checkpoint import open_checkpoint
from arbllm.format.output import output_directory, output_path
from arbllm.integrations.dense import dense_model
from arbllm.integrations.embeddings import packed_embeddings
from arbllm.model.source import open_model, save_tokenizer
from arbllm.nn import BinaryLinear


def export(
    checkpoint: Path, out: Path, *, dtype: str = "auto", overwrite: bool = False, trust_remote_code: bool = False
) -> None:
    """Write a packed checkpoint, or a GGUF file, as an ordinary Hugging Face one, its weights dequantized.

    Args:
        checkpoint: directory of a packed checkpoint, or a `.gguf` file.
        out: directory to write; it must not exist, or be empty, unless `overwrite` is set.
        dtype: `float32`, `bfloat16` or `float16`; `auto` keeps the dtype of embeddings and norms.
        overwrite: replace an existing directory.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: `checkpoint` is not a packed checkpoint, or is damaged.
        ArbllmError: `out` exists, or the disk is full; nothing half-written is left behind.
    """
    checkpoint, out = checkpoint.expanduser(), output_path(out, checkpoint)
    with output_directory(out, overwrite) as work:
        if checkpoint.suffix != ".gguf":
            open_checkpoint(checkpoint)
        model, tokenizer = open_model(str(checkpoint), dtype=dtype, trust_remote_code=trust_remote_code)
        check_disk_space(dense_bytes(model), work)
        dense_model(model).save_pretrained(work)
        save_tokenizer(tokenizer, checkpoint, work)


def dense_bytes(model: PreTrainedModel) -> int:
    """Bytes that a packed model takes once dequantized to its own dtype."""
    weights = sum(module.layout.weights for module in model.modules() if isinstance(module, BinaryLinear))
    weights += sum(layout.weights for layout in packed_embeddings(model).values())
    return sum(parameter.nbytes for parameter in model.parameters()) + weights * model.dtype.itemsize
