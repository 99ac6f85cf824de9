"""Adapters beside packed linears, by PEFT: the packed weights stay as they are, small dense matrices learn."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from arbllm.errors import ConfigError
from arbllm.nn import BinaryLinear


def for_packed(config: LoraConfig) -> LoraConfig:
    """Have a configuration put adapters beside packed linears as well, in place, and return it.

    What it learns of that is not written with the adapters: use it again to load them.

    >>> config = for_packed(LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    >>> model = get_peft_model(arbllm.load("packed"), config)
    >>> model.save_pretrained("adapters")
    >>> config = for_packed(LoraConfig.from_pretrained("adapters"))
    >>> model = PeftModel.from_pretrained(arbllm.load("packed"), "adapters", config=config)
    """
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
