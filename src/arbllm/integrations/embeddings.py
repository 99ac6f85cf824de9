"""Embeddings and heads in 8 bits inside a transformers model: listed, put where dense ones were, taken out again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from arbllm.embedding import Int8Embedding, Int8Linear
from arbllm.errors import CheckpointError
from arbllm.format.rows import RowLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_embeddings(model: nn.Module) -> dict[str, RowLayout]:
    """Layout of all embeddings and heads in 8 bits by module name, without tied heads, which have no tensors."""
    return {
        name: module.layout
        for name, module in model.named_modules()
        if isinstance(module, Int8Embedding) or (isinstance(module, Int8Linear) and module.tied is None)
    }


def put_head(model: PreTrainedModel, name: str, head: Int8Linear) -> None:
    """Put a head in the place of the dense one, whose weight transformers is not to tie any more: there is none."""
    _tie(model, name, None)
    model.set_submodule(name, head)


def make_room(model: PreTrainedModel, layouts: Mapping[str, RowLayout]) -> None:
    """Put empty embeddings and heads in the place of dense ones, before their tensors are loaded.

    A head that is not listed, but tied to an embedding that is, shares its tensors.

    Args:
        model: on any device, also `meta`.
        layouts: layout by name in the model.

    Raises:
        CheckpointError: the model has something else in such a place, or of another size.
    """
    for name, layout in layouts.items():
        dense = model.get_submodule(name)
        if not isinstance(dense, (nn.Embedding, nn.Linear)):
            raise CheckpointError(f"config.json: {name} is no embedding or head in the model, but packed as one")
        shape, packed = list(dense.weight.shape), [layout.rows, layout.columns]
        if shape != packed:
            raise CheckpointError(f"config.json: {name} is {shape} in the model, but {packed} as packed")
        if isinstance(dense, nn.Embedding):
            model.set_submodule(name, Int8Embedding(layout, dense))
        else:
            put_head(model, name, Int8Linear(layout, dense))
    tie_head(model)


def tie_head(model: PreTrainedModel) -> None:
    """Where the head is dense still, and tied to an embedding in 8 bits: put a head there that shares its tensors."""
    for target, source in list(model.all_tied_weights_keys.items()):
        name, embedding = target.removesuffix(".weight"), model.get_submodule(source.rpartition(".")[0])
        dense = model.get_submodule(target.rpartition(".")[0])
        if isinstance(embedding, Int8Embedding) and isinstance(dense, nn.Linear):
            put_head(model, name, Int8Linear(embedding.layout, dense, embedding))


def dense_embeddings(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put dense embeddings and heads of `dtype`, with the rounded weights, in the place of those in 8 bits."""
    modules = dict(model.named_modules())
    embeddings = {module: name for name, module in modules.items() if isinstance(module, Int8Embedding)}
    dense = {module: module.to_dense(dtype) for module in embeddings}
    for module, name in embeddings.items():
        model.set_submodule(name, dense[module])
    for name, head in modules.items():
        if isinstance(head, Int8Linear) and head.tied is not None:
            model.set_submodule(name, head.to_dense(dtype, dense[head.tied].get_parameter("weight")))
            _tie(model, name, embeddings[head.tied])
        elif isinstance(head, Int8Linear):
            model.set_submodule(name, head.to_dense(dtype))


def _tie(model: PreTrainedModel, head: str, embedding: str | None) -> None:
    """Let transformers tie the head's weight to the embedding's, or (None) to nothing."""
    target = f"{head}.weight"
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):  # as the class declares it, and as it came out
        keys = {key: source for key, source in (getattr(model, attribute) or {}).items() if not re.match(key, target)}
        setattr(model, attribute, keys | ({target: f"{embedding}.weight"} if embedding is not None else {}))
