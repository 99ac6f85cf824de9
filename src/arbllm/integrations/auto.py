"""Which of transformers' classes opens a model."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PretrainedConfig

from arbllm.errors import ModelError


def auto_class(config: PretrainedConfig) -> Any:
    """`AutoModelForCausalLM`, or what opens a language model that takes images, sounds or videos as well.

    Of some such models transformers has the language model alone as a causal one; that is taken, with a warning.

    Args:
        config: of a model, maybe with code of its own.

    Raises:
        ModelError: it is of a model that speaks as well, of which a part would have to be taken.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    if hasattr(config, "thinker_config"):
        raise ModelError(
            f"{type(config).__name__}: a model that also speaks; save its thinker by transformers' "
            f"{type(config).__name__.removesuffix('Config')}ThinkerForConditionalGeneration, and take that"
        )
    further = AutoModelForImageTextToText, AutoModelForMultimodalLM
    remote = getattr(config, "auto_map", None) or {}
    named = [auto for auto in (AutoModelForCausalLM, *further) if auto.__name__ in remote]
    # transformers finds classes by their names, which a model's own code may share with its.
    if named and not type(config).__module__.startswith("transformers."):
        return named[0]
    language = _model_class(AutoModelForCausalLM, config)
    for auto in further:
        whole = _model_class(auto, config)
        if whole and language in (None, whole):
            return auto
        if whole:
            warnings.warn(
                f"{language.__name__} is opened, a language model alone; what else {whole.__name__} reads, such as "
                "images, is left out",
                stacklevel=2,
            )
            return AutoModelForCausalLM
    return named[0] if named and not language else AutoModelForCausalLM


def _model_class(auto: Any, config: PretrainedConfig) -> Any:
    """The class of models that an auto class makes of a configuration; None where it knows none."""
    return auto._model_mapping.get(type(config), None)
