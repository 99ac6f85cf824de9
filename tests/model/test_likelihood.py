import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arbllm.model import likelihood as module
from arbllm.model.likelihood import TOKENS, log_likelihoods
from tests.helpers import pack_randomly
from tests.tiny import tiny_llama

LONGEST = 24
words = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def sharp():
    model = tiny_llama(tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def spelled_out(model, question, answer, longest=LONGEST):
    """One request at a time, question and answer together, in float64."""
    tokens = torch.tensor([*question, *answer][-longest - 1 :])
    with torch.no_grad():
        logits = model(tokens[None, :-1]).logits[0].double().log_softmax(dim=-1)[-len(answer) :]
    targets = tokens[-len(answer) :]
    return float(logits.gather(1, targets[:, None]).sum()), bool((logits.argmax(dim=-1) == targets).all())


def agree(model, requests):
    seen = []
    found = log_likelihoods(model, requests, LONGEST, lambda *n: seen.append(n))
    assert seen == [(done, len(requests)) for done in range(1, len(requests) + 1)]
    for (question, answer), (logarithm, greedy) in zip(requests, found, strict=True):
        expected = spelled_out(model, question, answer)
        assert logarithm == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
        assert greedy == expected[1]


@settings(max_examples=40, deadline=None)
@given(questions=st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=5),
       budget=st.sampled_from([1, 20, TOKENS]))  # fmt: skip
def test_as_if_each_answer_were_read_alone(sharp, questions, budget):
    requests = [(question, answer) for question, answers in questions for answer in answers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENS", budget)
        agree(sharp, requests)


def test_questions_of_one_token_and_too_long_ones(sharp):
    agree(sharp, [([3], [4]), ([3], [5, 6]), (list(range(30)), [1, 2]), (list(range(40)), [7]), ([1, 2], [0] * 24)])


def test_the_likeliest_answer_is_greedy(sharp):
    question = [5, 9, 2]
    with torch.no_grad():
        best = int(sharp(torch.tensor([question])).logits[0, -1].argmax())
    right, wrong = log_likelihoods(sharp, [(question, [best]), (question, [best - 1])], LONGEST)
    assert (right[1], wrong[1]) == (True, False)
    assert right[0] > wrong[0]


def test_a_packed_model_and_one_whose_head_is_not_apart(sharp, monkeypatch):
    requests = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7] * 9, [8, 9, 10])]
    agree(pack_randomly(tiny_llama()), requests)
    monkeypatch.setattr(module, "split_head", lambda _: None)
    agree(sharp, requests)


def test_a_question_is_read_once(sharp):
    lengths = []
    hook = sharp.model.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[:2]))
    log_likelihoods(sharp, [(list(range(20)), [number, number]) for number in range(5)], 64)
    hook.remove()
    assert lengths[2:] == [(1, 19), (5, 2)]  # after two probes of the head
