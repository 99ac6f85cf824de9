"""The tensors of a model's files by the names that the model has for them, read one after the other.

Mixtures are stored expert by expert under other names than transformers' own, which puts them together as it opens a
model. `StoredModel` does so for a few tensors at a time, by transformers' own rules.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from arbllm.errors import CheckpointError, ModelError
from arbllm.experts import SplitExperts, fused_name
from arbllm.format.checkpoint import INDEX_FILE, WEIGHTS_FILE
from arbllm.format.header import StoredTensor, read_header


@dataclass
class _Source:
    """Where a tensor comes from.

    Attributes:
        names: of what is stored, with the pattern that each of them matches.
        converter: puts them together; None where a single one is the tensor.
    """

    names: list[tuple[str, str]] = field(default_factory=list)
    converter: WeightConverter | None = None


class StoredModel:
    """The files of a dense model in a local directory.

    Attributes:
        tensors: all that is stored, by its name there.
    """

    tensors: Mapping[str, StoredTensor]

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        """Read the headers.

        Args:
            directory: safetensors files.
            model: as transformers makes it, on the meta device; its experts may be split afterwards.

        Raises:
            ModelError: there are none, or one is unreadable; names it.
        """
        self.tensors = _stored(directory)
        self._model = model
        self._whole = deepcopy(model)  # some conversions ask it for the shapes of experts that are split by then
        self._sources = _sources(model, self.tensors)

    def shape(self, name: str) -> list[int] | None:
        """The stored shape of the model's tensor `name`, None where it is put together.

        Raises:
            KeyError: no file has it.
        """
        whole, part = self._fused(name)
        source = self._sources[whole]
        return None if source.converter or part is not None else list(self._stored_as(source).shape)

    def check_experts(self) -> None:
        """See that the files have all experts, as far as names and shapes tell.

        Raises:
            ModelError: some are missing, or there are more; names the tensor.
        """
        for module, split in self._model.named_modules():
            if not isinstance(split, SplitExperts):
                continue
            for name in (f"{module}.{short}" for short in split.form.tensors):
                source = self._sources.get(name, _Source())
                counts = set(Counter(pattern for _, pattern in source.names).values())
                if source.converter is None and source.names:
                    counts = {self._stored_as(source).shape[0]}
                elif counts == {1}:
                    continue  # of one tensor, which is not split along its experts for all that is known
                for found in counts - {split.num_experts}:
                    raise self._incomplete(name, found, split.num_experts)

    def file(self, name: str) -> Path:
        """The file where the model's tensor `name`, or a part of it, lies."""
        return self._stored_as(self._sources[self._fused(name)[0]]).file

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors as they are stored, mostly memory-mapped: to be copied before the next one.

        Raises:
            ModelError: a file is unreadable; names it.
        """
        direct: dict[str, str] = {}
        joined: dict[str, list[tuple[str, int | None]]] = {}
        for name in names:
            whole, part = self._fused(name)
            source = self._sources[whole]
            if source.converter is None and part is None:
                direct[source.names[0][0]] = name
            else:
                joined.setdefault(whole, []).append((name, part))
        for stored, tensor in self.read_stored(list(direct)):
            yield direct[stored], tensor
        for whole, members in joined.items():
            tensor = self._join(whole)
            for name, part in members:
                yield name, tensor if part is None else self._expert(name, tensor[part])

    def read_stored(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their names in the files, memory-mapped: to be copied before the next one.

        Raises:
            ModelError: a file is unreadable; names it.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, members in by_file.items():
            try:
                with safe_open(file, framework="pt") as reader:
                    for name in members:
                        yield name, reader.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: not readable ({error}); download or copy the model again") from error

    def _stored_as(self, source: _Source) -> StoredTensor:
        return self.tensors[source.names[0][0]]

    def _fused(self, name: str) -> tuple[str, int | None]:
        """The name that transformers has for what the model has as `name`, and an expert's number in it."""
        match = re.fullmatch(r"(.+)\.(\d+)\.(\w+\.(?:weight|bias))", name)
        if not match or not isinstance(self._model.get_submodule(match[1]), SplitExperts):
            return name, None
        return f"{match[1]}.{fused_name(match[3])}", int(match[2])

    def _expert(self, name: str, tensor: Tensor) -> Tensor:
        """An expert's part of a tensor, as its linear has it."""
        split = self._model.get_submodule(name.rsplit(".", 3)[0])
        assert isinstance(split, SplitExperts)
        return tensor.mT if tensor.ndim == 2 and split.form.is_transposed else tensor

    def _join(self, name: str) -> Tensor:
        """A tensor that transformers would make of several, or of one by other means than taking it as it is.

        Raises:
            ModelError: they cannot be put together; names it.
        """
        source = self._sources[name]
        parts = {stored: tensor.clone() for stored, tensor in self.read_stored([stored for stored, _ in source.names])}
        tensor = parts.popitem()[1] if source.converter is None else self._convert(name, source, parts)
        owner = self._model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, SplitExperts) and len(tensor) != owner.num_experts:
            raise self._incomplete(name, len(tensor), owner.num_experts)
        return tensor

    def _convert(self, name: str, source: _Source, parts: dict[str, Tensor]) -> Tensor:
        """The tensor that transformers makes of these, which are used up."""
        assert source.converter
        for stored, pattern in source.names:
            source.converter.add_tensor(name, stored, pattern, partial(parts.pop, stored))
        try:
            made = source.converter.convert(name, model=self._whole, config=self._whole.config)[name]
        except Exception as error:  # tensors of wrong shapes fail in any way that torch knows
            raise ModelError(
                f"{name}: its parts do not go together ({error}); the model's files are damaged"
            ) from error
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def _incomplete(self, name: str, found: int, wanted: int) -> ModelError:
        return ModelError(f"{name}: the files have {found} of {wanted} experts; download the model again")


def _sources(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, _Source]:
    """Where each of the model's tensors comes from, by its name."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    sources: dict[str, _Source] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        source = sources.setdefault(target, _Source())
        if pattern is not None and source.converter is None:
            source.converter = deepcopy(by_pattern[pattern])  # which collects the parts of this one
        source.names.append((name, pattern or name))
    return sources


def _stored(directory: Path) -> Mapping[str, StoredTensor]:
    """All tensors of a directory's safetensors files."""
    files = [directory / WEIGHTS_FILE]
    if not files[0].exists():
        try:
            files = sorted({directory / name for name in _index(directory).values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{directory}: has no readable safetensors files; leave out --stream") from error
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            tensors |= read_header(file)[1]
        except CheckpointError as error:
            raise ModelError(str(error)) from error
    return tensors


def _index(directory: Path) -> dict[str, str]:
    return dict(json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"])
