"""Round a model's token embedding and output head to 8 bits."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from arbllm.embedding import Int8Embedding, Int8Linear
from arbllm.errors import ConfigError, ModelError, naming
from arbllm.format.rows import ROW_BITS
from arbllm.integrations.embeddings import put_head, tie_head

DENSE_BITS = 16


def check_embedding_bits(bits: int) -> None:
    """Refuse what `quantize_embeddings` cannot do.

    Raises:
        ConfigError: `bits` is neither 16 nor 8.
    """
    if bits not in (DENSE_BITS, ROW_BITS):
        raise ConfigError(
            f"embedding_bits (--embeddings) {bits!r} is unknown; choose 8, or 16 to leave them as they are"
        )


def quantize_embeddings(model: PreTrainedModel, bits: int = ROW_BITS) -> None:
    """Round a model's token embedding and output head to 8 bits with one scale a row, in place.

    To be done before `quantize_model`, whose calibration then makes up for the rounding. A head that is tied to the
    embedding stays tied. Position embeddings stay dense.

    Args:
        model: a dense causal language model.
        bits: 8, or 16 to leave all as it is.

    Raises:
        ConfigError: `bits` is neither 16 nor 8.
        ModelError: the embedding or head is of a kind that cannot be rounded, or has entries that are not finite;
            names the module.
    """
    check_embedding_bits(bits)
    if bits == DENSE_BITS:
        return
    if not any(parameter.ndim == 1 for parameter in model.parameters()):
        # transformers takes the model's dtype from its parameters, of which none would be left.
        raise ModelError(
            f"{type(model).__name__}: embeddings cannot be rounded where there are no norm weights or biases"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    _check_kind(embedding, nn.Embedding, names)
    if head is not None:
        _check_kind(head, nn.Linear, names)
    tied = head is not None and head.weight is embedding.weight
    with naming(names[embedding]):
        model.set_submodule(names[embedding], Int8Embedding.from_dense(embedding))
    if tied:
        tie_head(model)
    if isinstance(model.get_output_embeddings(), nn.Linear):
        with naming(names[head]):
            put_head(model, names[head], Int8Linear.from_dense(head))


def _check_kind(module: nn.Module, kind: type[nn.Module], names: dict[nn.Module, str]) -> None:
    """Refuse what is not a look-up or a product with a matrix of floats.

    Raises:
        ModelError: names the module.
    """
    name = names.get(module, type(module).__name__)
    weight = getattr(module, "weight", None)
    if not isinstance(module, kind) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ModelError(
            f"{name}: {type(module).__name__} cannot be rounded to 8 bits, only a {kind.__name__} of floats can; "
            "leave embeddings and head as they are (--embeddings 16)"
        )
