import pytest
import torch

from arbllm.model.head import split_head, tokens_at_a_time, vocabulary_size
from tests.model.tiny_models import VOCABULARY, tiny_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
def test_the_head_of_a_model_makes_its_logits_from_hidden_states(name):
    model, ids = tiny_model(name), torch.arange(10)[None]
    head = split_head(model)
    assert head is not None
    hidden = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(head(hidden), model(input_ids=ids).logits)


def test_a_head_whose_logits_are_capped_afterwards_is_not_split_off():
    assert split_head(tiny_model("gemma2", final_logit_softcapping=0.05)) is None


def test_pieces_fit_in_their_bytes(monkeypatch):
    model = tiny_model("llama")
    assert vocabulary_size(model) == VOCABULARY
    monkeypatch.setattr("arbllm.model.head.LOGIT_BYTES", 4 * VOCABULARY * 5 + 3)
    assert tokens_at_a_time(model) == 5
    monkeypatch.setattr("arbllm.model.head.LOGIT_BYTES", 1)
    assert tokens_at_a_time(model) == 1
