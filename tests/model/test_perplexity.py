import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, PreTrainedModel

from arbllm.errors import ModelError, TextError
from arbllm.model.perplexity import perplexity

SMALL = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=32, max_position_embeddings=64),
    "gpt2": GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt with project_out": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=64),
    "gemma2, capped logits": Gemma2Config(
        **SMALL,
        num_key_value_heads=2,
        intermediate_size=32,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=0.05,
    ),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_loss_of_transformers(name, tokens, monkeypatch):
    monkeypatch.setattr("arbllm.model.head.LOGIT_BYTES", 4 * 97 * 5)  # pieces of five tokens, the last one shorter
    model = build(name)
    windows = tokens[:128].view(4, 32)
    losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    measured = perplexity(model, tokens, 32)
    assert measured.windows == 4
    assert measured.perplexity == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)


def test_the_largest_logits_are_one_piece(tokens, monkeypatch):
    monkeypatch.setattr("arbllm.model.head.LOGIT_BYTES", 4 * 97 * 5)
    model = build("llama")
    lengths: list[int] = []
    model.lm_head.register_forward_hook(lambda layer, inputs, output: lengths.append(output.shape[1]))
    perplexity(model, tokens, 32, max_windows=1)
    assert max(lengths[2:]) == 5  # the first two calls are the probe
    assert sum(lengths[2:]) == 31


def test_progress_and_max_windows(tokens):
    seen: list[tuple[int, int, float]] = []
    measured = perplexity(build("llama"), tokens, 32, max_windows=2, on_window=lambda *event: seen.append(event))
    assert [(done, total) for done, total, _ in seen] == [(1, 2), (2, 2)]
    assert seen[-1][2] == pytest.approx(measured.perplexity)


def test_a_text_in_pieces(tokens):
    model = build("llama")
    whole = perplexity(model, tokens, 32)
    pieces = [perplexity(model, tokens, 32, max_windows=2), perplexity(model, tokens, 32, skip_windows=2)]
    assert [piece.windows for piece in pieces] == [2, whole.windows - 2]
    total = sum(piece.windows * math.log(piece.perplexity) for piece in pieces)
    assert math.exp(total / whole.windows) == pytest.approx(whole.perplexity)


def test_a_collapsed_model_has_infinite_perplexity_and_no_overflow(tokens):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, tokens, 32).perplexity == math.inf


def test_logits_that_are_not_finite_are_an_error(tokens):
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ModelError, match="not finite"):
        perplexity(model, tokens, 32)


@pytest.mark.parametrize(
    ("length", "context", "options", "message"),
    [
        (31, 32, {}, "31 tokens, less than one window of 32"),
        (0, 32, {}, "0 tokens"),
        (150, 1, {}, "at least 2"),
        (150, 32, {"max_windows": 0}, "max-windows"),
        (150, 32, {"skip_windows": 4}, "skip-windows must be from 0 to 3"),
    ],
)
def test_unusable_text_and_options(tokens, length, context, options, message):
    with pytest.raises(TextError, match=message):
        perplexity(build("llama"), tokens[:length], context, **options)


def test_context_beyond_the_model(tokens):
    with pytest.raises(ModelError, match="at most 64 tokens"):
        perplexity(build("llama"), tokens, 65)
