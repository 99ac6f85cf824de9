"""Packed checkpoints in transformers: `save_pretrained` writes them, `from_pretrained` reads and verifies them.

Importing this module registers the format with transformers; `import arbllm` sees to it (see `arbllm.integrations`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

# transformers may still be importing itself at this point: take here only what is there by then.
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from arbllm import __version__
from arbllm.errors import CheckpointError, ConfigError
from arbllm.experts import SplitExperts, split_experts
from arbllm.format.accounting import StorageSize, total_size
from arbllm.format.checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    Checkpoint,
    bitmap_coding,
    check_structure,
    check_version,
    file_metadata,
)
from arbllm.format.checksum import checksum
from arbllm.format.coding import RAW, coded_planes, decode, encode
from arbllm.integrations.embeddings import make_room, packed_embeddings
from arbllm.nn import BinaryLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mark_packed(model: PreTrainedModel, quantization_config: Mapping[str, Any] | ArbllmConfig) -> None:
    """Make `model.save_pretrained` write a packed checkpoint.

    Args:
        model: a model with `BinaryLinear` modules, as `arbllm.model.quantize` leaves it.
        quantization_config: what config.json shall tell: `binarization`, `statistics`, `calibration`, `bitmap`. The
            list of linears, and that of embeddings in 8 bits, are taken from the model itself.
    """
    config = quantization_config
    if not isinstance(config, ArbllmConfig):
        config = ArbllmConfig.from_dict(dict(config))
    config.linears, config.embeddings = packed_linears(model), _embeddings(model)
    config.arbllm_version = __version__
    model.hf_quantizer = ArbllmQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = config


def stored_size(model: nn.Module) -> StorageSize:
    """What the packed linears take in the files that the model was loaded from, or else in memory; nothing if dense."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, ArbllmQuantizer) and quantizer.checkpoint:
        return quantizer.checkpoint.size.linears
    return total_size(module.layout for module in model.modules() if isinstance(module, BinaryLinear))


def packed_linears(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Layout and options of every `BinaryLinear` by module name: `linears` of the quantization config."""
    return {
        name: {**module.layout.to_dict(), "bias": module.bias is not None, "transposed": module.transposed}
        for name, module in model.named_modules()
        if isinstance(module, BinaryLinear)
    }


def _embeddings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`embeddings` of the quantization config."""
    return {name: layout.to_dict() for name, layout in packed_embeddings(model).items()}


class ArbllmConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Attributes:
        binarization: method and options, `BinarizationConfig.to_dict`.
        linears: module name -> `Layout.to_dict` with `bias` and `transposed`.
        embeddings: module name -> `RowLayout.to_dict` of embeddings and heads in 8 bits.
        statistics: module name -> `output_error` and `weight_error`.
        calibration: the text that the Hessians come from: its name, windows, window length, seed.
        bitmap: how files hold group bitmaps, one of `arbllm.format.coding.CODINGS`; a model that was loaded is saved
            in the same way again.
        format_version: of the packed tensors, see docs/format.md.
        arbllm_version: the release that wrote the checkpoint.
    """

    def __init__(
        self,
        binarization: Mapping[str, Any] | None = None,
        linears: Mapping[str, Any] | None = None,
        embeddings: Mapping[str, Any] | None = None,
        statistics: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        bitmap: str = RAW,
        format_version: int = FORMAT_VERSION,
        arbllm_version: str = __version__,
        **further: Any,
    ) -> None:
        """Take the values of config.json; those of later releases that did not change the format are kept.

        Raises:
            CheckpointError: the format version, or the coding, is another than this release reads.
        """
        check_version({"format_version": format_version})
        self.bitmap = bitmap_coding({"bitmap": bitmap})
        self.__dict__.update(deepcopy(further))
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.arbllm_version = arbllm_version
        self.binarization = dict(deepcopy(binarization or {}))
        self.linears = dict(deepcopy(linears or {}))
        self.embeddings = dict(deepcopy(embeddings or {}))
        self.statistics = dict(deepcopy(statistics or {}))
        self.calibration = dict(deepcopy(calibration or {}))


class ArbllmQuantizer(HfQuantizer):
    """Puts `BinaryLinear` in place of the packed linears before weights are loaded, and verifies what is loaded.

    Attributes:
        checkpoint: the files that the model was loaded from; None where it comes from none.
    """

    requires_calibration = True
    quantization_config: ArbllmConfig
    checkpoint: Checkpoint | None = None
    _modules: dict[str, str]

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients, but pass them on: to adapters, for instance."""
        return True

    def is_serializable(self, **_: Any) -> bool:
        """`save_pretrained` writes the packed form."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Verify the files, then make room for their packed tensors.

        Raises:
            CheckpointError: the files are damaged, or do not fit the model.
        """
        if not checkpoint_files:
            raise CheckpointError("a packed model is loaded from its files: pass their directory to from_pretrained")
        files = [Path(file) for file in checkpoint_files]
        self.checkpoint = checkpoint = check_structure(files, self.quantization_config.to_dict())
        checkpoint.verify_contents()
        places = _Places(model)
        if any(places.find(name) is None for name in checkpoint.layouts):
            split_experts(model)
            _spare_mixtures(model)
            places = _Places(model)
        _check_dense(model, checkpoint)
        self._modules = {}
        taken: set[str] = set()
        for name, layout in checkpoint.layouts.items():
            place, dense = places.module(name)
            if place in taken:
                raise CheckpointError(f"config.json: {name} is packed twice, under two names")
            taken.add(place)
            options = self.quantization_config.linears[name]
            weight = dense.get_parameter("weight")
            shape = tuple(weight.T.shape if options["transposed"] else weight.shape)
            if shape != (layout.rows, layout.columns):
                raise CheckpointError(
                    f"config.json: {name} is {list(shape)} in the model, but {[layout.rows, layout.columns]} as packed"
                )
            packed = BinaryLinear(layout, options["bias"], options["transposed"], "meta", weight.dtype)
            packed.weight = _stand_in()
            for key in coded_planes(layout, checkpoint.bitmap):
                coded = checkpoint.tensors[f"{name}.{key}"]
                packed.register_buffer(key, torch.empty(coded.shape, dtype=torch.uint8, device="meta"))
            model.set_submodule(place, packed)
            self._modules[name] = place
        embeddings = {}
        for name, rows in checkpoint.embeddings.items():
            if model.get_output_embeddings() is None and places.find(name) is None:
                continue  # the head, which this model does not have
            self._modules[name] = place = places.module(name)[0]
            embeddings[place] = rows
        make_room(model, embeddings)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        """See that every packed tensor in the model is the one in the file: transformers only warns where one is not.

        Then decode group bitmaps.

        Raises:
            CheckpointError: naming the tensor.
        """
        checkpoint = self.checkpoint
        assert checkpoint  # the method above has set it
        for name, place in self._modules.items():
            module: Any = model.get_submodule(place)
            if isinstance(module, BinaryLinear):
                del module.weight
            for key in module.layout.tensors():
                tensor = module.get_buffer(key)
                if not tensor.is_meta and checksum(tensor) != checkpoint.checksums[f"{name}.{key}"]:
                    file = checkpoint.tensors[f"{name}.{key}"].file
                    raise CheckpointError(f"{file}: tensor {name}.{key} did not reach the model as it is stored")
            if isinstance(module, BinaryLinear):
                _decode_bitmaps(module, name, checkpoint)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from arbllm.integrations.dense import dense_model

        return dense_model(model, dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` is about to write, and the metadata of the files: checksums of all their tensors.

        Raises:
            ConfigError: adapters are beside packed linears.
        """
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        config = self.quantization_config
        config.linears, config.embeddings = packed_linears(model), _embeddings(model)
        # Files hold the names of the modules, whatever names the model's dense checkpoint had.
        model._weight_conversions = []
        state = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, BinaryLinear):
                if name.endswith(".base_layer"):
                    raise ConfigError(
                        f"{name} has adapters beside it: save those by the save_pretrained of PEFT's model, or take "
                        "them off first, by its unload()"
                    )
                for key, width in coded_planes(module.layout, config.bitmap).items():
                    state[f"{name}.{key}"] = encode(state[f"{name}.{key}"], width, config.bitmap)
        tensors = remove_tied_weights_from_state_dict(dict(state), model)
        for name in model._keys_to_ignore_on_save or ():
            tensors.pop(name, None)
        described = json.loads(model.config.to_json_string(use_diff=True))
        return state, file_metadata(tensors, config.linears, config.embeddings, described)


def _decode_bitmaps(module: BinaryLinear, name: str, checkpoint: Checkpoint) -> None:
    """Put the planes of a linear in the place of their coded forms.

    Raises:
        CheckpointError: naming the tensor.
    """
    for key, width in coded_planes(module.layout, checkpoint.bitmap).items():
        where = f"{checkpoint.tensors[f'{name}.{key}'].file}: tensor {name}.{key}"
        coded = module.get_buffer(key)
        if coded.is_meta:
            raise CheckpointError(
                f"{where} is coded, and cannot be left on the disk: load the model without offloading"
            )
        module.register_buffer(key, decode(coded, module.layout.rows, width, checkpoint.bitmap, where))


def _stand_in() -> torch.Tensor:
    """What stands for the dense weight while a model is loaded: an empty tensor that counts as initialized.

    Some models (GPT-2) initialize the weights of their linears by name, whether they were loaded or not.
    """
    weight = torch.empty(0, device="meta")
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


def _spare_mixtures(model: PreTrainedModel) -> None:
    """Keep transformers from initializing what holds experts: some such modules (Qwen3-Omni's) reach for fused ones."""
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True


def _check_dense(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """See that the dense tensors of the files have the shapes that they have in the model.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, tensor in model.state_dict().items():
        stored = checkpoint.tensors.get(name)
        if stored and stored.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{stored.file}: tensor {name} is {list(stored.shape)}, but {list(tensor.shape)} in the model that "
                "config.json describes"
            )


class _Places:
    """Where modules of a checkpoint lie in a model, which may be without its head (`AutoModel`), or have one more."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._prefix = f"{model.base_model_prefix}."
        self._names = {name for name, _ in model.named_modules()}

    def find(self, name: str) -> str | None:
        """A module's name in the model."""
        names = name, name.removeprefix(self._prefix), self._prefix + name
        return next((place for place in names if place in self._names), None)

    def module(self, name: str) -> tuple[str, nn.Module]:
        """The name, and the module.

        Raises:
            CheckpointError: it is not there.
        """
        place = self.find(name)
        if place is None:
            raise CheckpointError(f"config.json: the packed linear {name} is not in a {type(self._model).__name__}")
        return place, self._model.get_submodule(place)


def register() -> None:
    """Make the format known to transformers, as importing this module has done; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(ArbllmConfig)
        register_quantizer(QUANT_METHOD)(ArbllmQuantizer)


register()
