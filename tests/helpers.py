"""Random packed matrices and models for tests that need no solver."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arbllm.config import BinarizationConfig
from arbllm.format.bitplanes import pack
from arbllm.format.layout import Layout
from arbllm.format.matrix import BinaryMatrix
from arbllm.integrations.transformers import mark_packed
from arbllm.nn import BinaryLinear


def random_matrix(
    rows: int,
    columns: int,
    *,
    groups: int = 2,
    salient_groups: int = 2,
    salient: int = 0,
    block_size: int = 128,
    row_means: bool = False,
    column_scaled: bool = True,
    seed: int = 0,
) -> BinaryMatrix:
    """A `BinaryMatrix` of random packed tensors that agree with one another; padding bits are zero, scales positive.

    Args:
        rows: n.
        columns: m.
        groups: groups of regular weights: 1, 2 or 4.
        salient_groups: groups of salient weights: 1, 2 or 4.
        salient: c, salient columns; they fall on random columns, so blocks with none, and with nothing else, occur.
        block_size: K.
        row_means: whether the matrix stores row means (as plain, ARB and ARB-X do).
        column_scaled: whether it stores column scales (as ARB-RC does).
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    column_bitmap = torch.zeros(columns, dtype=torch.bool)
    column_bitmap[torch.randperm(columns, generator=generator)[:salient]] = True
    layout = Layout(
        rows=rows,
        columns=columns,
        block_size=block_size,
        groups=groups,
        salient_groups=salient_groups,
        salient=salient,
        row_scale_slots=_slots(column_bitmap, block_size, groups, 2 * salient_groups),
        row_mean_slots=_slots(column_bitmap, block_size, groups, salient_groups) if row_means else 0,
        column_scaled=column_scaled,
    )

    def bits(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).bool()

    tensors = {
        name: 0.5 + torch.rand(shape, generator=generator)
        for name, (dtype, shape) in layout.tensors().items()
        if dtype == torch.float16
    }
    tensors = {name: (tensor / columns**0.5 if "row" in name else tensor).half() for name, tensor in tensors.items()}
    tensors["signs"] = pack(bits(rows, columns))
    if layout.bitmap_planes:
        choices = torch.where(column_bitmap, salient_groups, groups)
        codes = (torch.rand(rows, columns, generator=generator) * choices).long()
        tensors["group_bitmap"] = pack(torch.stack([codes >> plane & 1 for plane in range(layout.bitmap_planes)], 1))
    if salient:
        tensors["column_bitmap"] = pack(column_bitmap)
        tensors["second_signs"] = pack(bits(rows, salient))
    return BinaryMatrix.from_tensors(layout, tensors)


def pack_randomly(model: PreTrainedModel, salient: int = 3, block_size: int = 16) -> PreTrainedModel:
    """Put a random `BinaryLinear` in place of every linear but the head, and mark the model as packed; in place."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for seed, (name, module) in enumerate(linears):
        if module is model.get_output_embeddings():
            continue
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.T.shape if transposed else module.weight.shape
        matrix = random_matrix(rows, columns, salient=salient, block_size=block_size, seed=seed)
        model.set_submodule(name, BinaryLinear.from_matrix(matrix, module.bias, transposed))
    mark_packed(
        model,
        {
            "binarization": BinarizationConfig(block_size=block_size).to_dict(),
            "statistics": {name: {"output_error": 0.1, "weight_error": 0.2} for name, _ in linears},
            "calibration": {"text": "random", "windows": 0, "window_length": 0, "seed": 0},
        },
    )
    return model


def _slots(column_bitmap: Tensor, block_size: int, regular_width: int, salient_width: int) -> int:
    """Slots of one row over all blocks, counted block by block."""
    return sum(
        regular_width * bool((~block).any()) + salient_width * bool(block.any())
        for block in column_bitmap.split(block_size)
    )
