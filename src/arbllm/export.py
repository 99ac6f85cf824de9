"""A packed checkpoint, or a GGUF file, to an ordinary one, for engines that know nothing of packed weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arbllm.device import check_disk_space
from arbllm.errors import ConfigError
from arbllm.format.checkpoint import open_checkpoint
from arbllm.format.output import output_directory
from arbllm.integrations.embeddings import dense_embeddings, packed_embeddings
from arbllm.model.source import open_model
from arbllm.nn import BinaryLinear


def dense_model(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace every `BinaryLinear` of `model`, and what else is packed, in place, by the dense layers they stand for.

    Args:
        model: a packed model, as `arbllm.load` returns it.
        dtype: of the dense weights; None takes the dtype of the model's other weights.

    Returns:
        The same object, now an ordinary model: nothing in its config tells of quantization.
    """
    dtype = dtype or model.dtype
    packed = {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    for name, module in packed.items():
        model.set_submodule(name, dense_layer(module, dtype))
    dense_embeddings(model, dtype)
    for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as they are
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    return model


def dense_layer(module: BinaryLinear, dtype: torch.dtype) -> nn.Linear | Conv1D:
    """The `nn.Linear` (or, where the source was one, GPT-2's transposed `Conv1D`) with the dequantized weight."""
    weight = module.matrix.dequantize(dtype)
    rows, columns = weight.shape
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    layer: nn.Linear | Conv1D
    with torch.device("meta"):
        layer = Conv1D(rows, columns) if module.transposed else nn.Linear(columns, rows, bias=bias is not None)
    layer.weight = nn.Parameter(weight.T.contiguous() if module.transposed else weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    elif module.transposed:
        layer.bias = nn.Parameter(torch.zeros(rows, dtype=dtype), requires_grad=False)
    return layer


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
    if checkpoint.resolve() == out.resolve():
        raise ConfigError(f"{out} is the packed checkpoint itself; choose another output directory")
    with output_directory(out, overwrite) as work:
        if checkpoint.suffix != ".gguf":
            open_checkpoint(checkpoint)
        model, tokenizer = open_model(str(checkpoint), dtype=dtype, trust_remote_code=trust_remote_code)
        check_disk_space(dense_bytes(model), work)
        dense_model(model).save_pretrained(work)
        tokenizer.save_pretrained(work)


def dense_bytes(model: PreTrainedModel) -> int:
    """Bytes that a packed model takes once dequantized to its own dtype."""
    weights = sum(module.layout.weights for module in model.modules() if isinstance(module, BinaryLinear))
    weights += sum(layout.weights for layout in packed_embeddings(model).values())
    return sum(parameter.nbytes for parameter in model.parameters()) + weights * model.dtype.itemsize
