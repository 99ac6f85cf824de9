"""A packed model in memory to the ordinary one that it stands for."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arbllm.experts import fuse_experts
from arbllm.integrations.embeddings import dense_embeddings
from arbllm.nn import BinaryLinear


def dense_model(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace every `BinaryLinear` of `model`, and what else is packed, in place, by the dense layers they stand for.

    Args:
        model: a packed model, as `arbllm.load` returns it.
        dtype: of all weights; None leaves those that are dense as they are, and gives the others the model's dtype.

    Returns:
        The same object, now an ordinary model: nothing in its config tells of quantization.
    """
    if dtype is not None:
        for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as they are
            parameter.data = parameter.data.to(dtype)
    dtype = dtype or model.dtype
    packed = {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}
    for name, module in packed.items():
        model.set_submodule(name, dense_layer(module, dtype))
    fuse_experts(model)
    model._weight_conversions = None  # it is to be saved as its makers name things, as transformers does by default
    dense_embeddings(model, dtype)
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
