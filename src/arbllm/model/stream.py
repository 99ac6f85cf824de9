"""Models larger than memory: built without weights, which are read from their files one decoder block at a time.

Embeddings and last norm are read at once, a block when its turn comes, the head in the end. Quantized, a block is a
seventh of its size and stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from arbllm.errors import ModelError
from arbllm.format.checkpoint import INDEX_FILE, WEIGHTS_FILE
from arbllm.format.checksum import canonical_checksum, checksum
from arbllm.integrations.auto import auto_class
from arbllm.model.source import DTYPES, check_dtype
from arbllm.model.stored import StoredModel
from arbllm.model.walk import DecoderBlock, check_weights, find_blocks

SAMPLE = 32768
"""Numbers of each tensor that count in a streamed model's fingerprint: to read all of it would take too long."""


class StreamedModel:
    """A dense model in a local directory, opened block by block.

    >>> streamed = StreamedModel("llama-7b")
    >>> quantize_model(streamed.model, windows, config, load_block=streamed.load_block)

    Attributes:
        model: the model, in evaluation mode, with the weights of its decoder blocks on the meta device until
            `load_block` has read them, and those of its head, unless they are the embeddings', until `load_head` has.
    """

    model: PreTrainedModel

    def __init__(self, directory: Path | str, dtype: str = "auto", trust_remote_code: bool = False) -> None:
        """Build the model and read all but its blocks and head.

        Args:
            directory: config.json and safetensors files.
            dtype: to open the model in; `auto` as config.json says.
            trust_remote_code: run model code that comes with the checkpoint.

        Raises:
            ModelError: it is no such directory, or its files do not hold what the model needs; names the tensor.
        """
        self.directory = Path(directory).expanduser()
        self.model = empty_model(self.directory, dtype, trust_remote_code).eval()
        self._stored = StoredModel(self.directory, self.model)
        self.model.tie_weights()
        blocks = find_blocks(self.model)  # splits experts
        self._check_names()
        head = self.model.get_output_embeddings()
        later = [block.module for block in blocks] + ([head] if head is not None else [])
        prefixes = tuple(f"{name}." for name, module in self.model.named_modules() if module in later)
        self._load(self.model, "", [name for name in self._missing(self.model, "") if not name.startswith(prefixes)])
        self.model.tie_weights()

    def load_block(self, block: DecoderBlock) -> None:
        """Read a block's weights, unless they are there.

        Raises:
            ModelError: a file is unreadable, or a weight has NaN or infinite entries; names it.
        """
        prefix = f"{block.name}."
        missing = self._missing(block.module, prefix)
        if missing:
            self._load(block.module, prefix, missing)
            check_weights([block])

    def load_head(self) -> None:
        """Read the head's weights, unless they are there, as tied ones are.

        Raises:
            ModelError: a file is unreadable; names it.
        """
        head = self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            if module is head:
                self._load(module, f"{name}.", self._missing(module, f"{name}."))

    def fingerprint(self) -> str:
        """Checksum of all names, dtypes, shapes, and of the first `SAMPLE` numbers of each tensor."""
        sums: dict[str, Any] = {}
        for name, tensor in self._stored.read_stored(list(self._stored.tensors)):
            stored = self._stored.tensors[name]
            sums[name] = [stored.dtype, list(stored.shape), checksum(tensor.flatten()[:SAMPLE])]
        return canonical_checksum(sums)

    def _check_names(self) -> None:
        """Refuse files whose tensors are not the model's, by name and shape."""
        self._stored.check_experts()
        for name in self._missing(self.model, ""):
            wanted = list(_tensor(self.model, name).shape)
            try:
                shape = self._stored.shape(name)
            except KeyError as error:
                raise ModelError(
                    f"{self.directory}: {name} is not in its files under this name; such a model cannot be streamed: "
                    "leave out --stream"
                ) from error
            if shape is not None and shape != wanted:
                raise ModelError(f"{self._stored.file(name)}: {name} is {shape}, but {wanted} in the model")

    def _missing(self, module: nn.Module, prefix: str) -> list[str]:
        """Full names of a module's tensors on the meta device, each shared one once and without tied ones."""
        tied = set(self.model.all_tied_weights_keys)
        return [
            name
            for short, tensor in module.state_dict().items()
            if tensor.is_meta and (name := prefix + short) not in tied
        ]

    def _load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        for name, tensor in self._stored.read(names):
            owner_name, _, key = name.removeprefix(prefix).rpartition(".")
            owner, empty = module.get_submodule(owner_name), _tensor(module, name.removeprefix(prefix))
            if tensor.shape != empty.shape:
                found, wanted = list(tensor.shape), list(empty.shape)
                raise ModelError(f"{self._stored.file(name)}: {name} is {found}, but {wanted} in the model")
            value = tensor.to(empty.dtype, copy=True, memory_format=torch.contiguous_format)
            if key in owner._parameters:
                owner._parameters[key] = nn.Parameter(value, requires_grad=empty.requires_grad)
            else:
                owner._buffers[key] = value


def can_stream(name_or_path: str) -> bool:
    """Whether a model is a local directory with safetensors files."""
    path = Path(name_or_path).expanduser()
    return path.is_dir() and any((path / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))


def empty_model(source: Path | str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without weights; its buffers, such as rotary frequencies, are there.

    Args:
        source: a hub id or a local directory, of which config.json is read.
        dtype: of its parameters; `auto` as config.json says.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        ConfigError: the dtype is unknown.
        ModelError: config.json cannot be read, or describes no causal language model, or a quantized one.
    """
    check_dtype(dtype)
    from accelerate import init_empty_weights

    source = Path(source).expanduser() if Path(source).expanduser().exists() else source
    generation = Path(source) / "generation_config.json"
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        chosen = DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)
        if generation.exists():
            model.generation_config = GenerationConfig.from_pretrained(source)
    except Exception as error:  # configuration and remote code fail in any way that they know
        raise ModelError(f"{source}: its model cannot be built ({str(error).strip().partition(chr(10))[0]})") from error
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method", "by a method that it does not name")
        raise ModelError(f"{source}: is quantized already ({method}); start from the original model")
    return model


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    found = module.get_submodule(owner)
    return found._parameters[key] if key in found._parameters else found.get_buffer(key)  # type: ignore[return-value]
