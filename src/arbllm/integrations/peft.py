"""Adapters beside packed linears, by PEFT: the packed weights stay as they are, small dense matrices learn."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from arbllm.errors import ConfigError
from arbllm.nn import BinaryLinear

INITIALIZATIONS = (True, False, "gaussian", "eva")
"""Those of LoRA's matrices that do not look at the weight."""


def for_packed(config: LoraConfig) -> LoraConfig:
    """Have a configuration put adapters beside packed linears as well, in place, and return it.

    What it learns of that is not written with the adapters: use it again to load them.

    Raises:
        ConfigError: it is of another kind than plain LoRA, or has options that need the weight itself.

    >>> config = for_packed(LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    >>> model = get_peft_model(arbllm.load("packed"), config)
    >>> model.save_pretrained("adapters")
    >>> config = for_packed(LoraConfig.from_pretrained("adapters"))
    >>> model = PeftModel.from_pretrained(arbllm.load("packed"), "adapters", config=config)
    """
    if type(config) is not LoraConfig:
        raise ConfigError(f"{type(config).__name__}: beside packed linears there is LoRA alone; use a LoraConfig")
    if config.target_modules == "all-linear":
        raise ConfigError(
            "target_modules='all-linear' leaves out packed linears: name them, as in ['q_proj', 'v_proj']"
        )
    if config.use_dora:
        raise ConfigError("use_dora needs the weight itself, which is packed: leave it out")
    if config.init_lora_weights not in INITIALIZATIONS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} needs the weight itself, which is packed: leave it out, "
            "or choose 'gaussian'"
        )
    config._register_custom_module({BinaryLinear: PackedLora})
    return config


class PackedLora(lora.Linear):
    """A packed linear and its adapters: y = x W^T + bias + x A^T B^T times a scale."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, BinaryLinear), "it is registered for these"
        return module.in_features, module.out_features

    def merge(self, *_: Any, **__: Any) -> None:
        """Adapters cannot become a part of packed bits.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "adapters cannot be merged into packed weights: keep them beside, or merge them into the dense model that "
            "`arbllm export` writes"
        )
