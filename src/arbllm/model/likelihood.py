"""Log likelihoods of answers: a question is read once for all of its answers, and logits are computed for them alone.

The harness's own loop reads a question once for every answer and computes logits at each of its tokens, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from arbllm.model.head import Head, split_head, tokens_at_a_time

TOKENS = 1024  # of a batch, padding included
Tokens = Sequence[int]
OnRequest = Callable[[int, int], None]
T = TypeVar("T")


@dataclass
class _Question:
    """A question without its last token, and what follows: for the place of each request, that token and the answer."""

    tokens: Tokens
    answers: dict[int, Tokens] = field(default_factory=dict)


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    longest: int,
    on_request: OnRequest | None = None,
) -> list[tuple[float, bool]]:
    """How likely each answer is after its question.

    Args:
        model: a causal LM whose state is a cache of keys and values, in its evaluation dtype and on its device.
        requests: (tokens of the question, tokens of the answer), neither empty.
        longest: tokens that the model takes at once; longer questions lose their beginning.
        on_request: called with (requests done, requests in all).

    Returns:
        Of each request, in their order: the log likelihood of the answer's tokens together, in nats, and whether each
        of them is the likeliest at its place.
    """
    model.eval()
    head = split_head(model)
    budget = TOKENS if head else min(TOKENS, tokens_at_a_time(model))
    found: dict[int, tuple[float, bool]] = {}
    for questions in _batches(_group(requests, longest), lambda question: len(question.tokens), budget):
        cache = _read(model, questions)
        answers = [(row, *answer) for row, question in enumerate(questions) for answer in question.answers.items()]
        for batch in _batches(answers, lambda answer: len(answer[2]), budget):
            rows, places, tokens = zip(*batch, strict=True)
            part = deepcopy(cache)
            part.batch_select_indices(torch.tensor(rows, device=model.device))
            before = [len(questions[row].tokens) for row in rows]
            for place, likelihood in zip(places, _score(model, head, part, before, tokens), strict=True):
                found[place] = likelihood
                if on_request:
                    on_request(len(found), len(requests))
    return [found[place] for place in range(len(requests))]


def _group(requests: Sequence[tuple[Tokens, Tokens]], longest: int) -> list[_Question]:
    """Requests by question. All but an answer's last token are read: of them the last `longest` are kept."""
    questions: dict[tuple[int, ...], _Question] = {}
    for place, (question, answer) in enumerate(requests):
        tokens = [*question, *answer][-longest - 1 :]
        start = max(0, len(tokens) - len(answer) - 1)
        key = tuple(tokens[:start])
        questions.setdefault(key, _Question(key)).answers[place] = tokens[start:]
    return list(questions.values())


def _batches(items: Sequence[T], length: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Items, longest first, as many at a time as stay within the budget when all are as long as the first."""
    left = sorted(items, key=length, reverse=True)
    while left:
        size = max(1, budget // max(1, length(left[0])))
        yield left[:size]
        left = left[size:]


def _read(model: PreTrainedModel, questions: Sequence[_Question]) -> DynamicCache:
    """Keys and values of some questions, the longest first; shorter ones are padded on the left."""
    cache = DynamicCache(config=model.config)
    padded = len(questions[0].tokens)
    if padded:
        lengths = [len(question.tokens) for question in questions]
        tokens = [[0] * (padded - len(question.tokens)) + [*question.tokens] for question in questions]
        ids = torch.tensor(tokens, device=model.device)
        mask = _left_padded(lengths, padded).to(model.device)
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), past_key_values=cache,
                         use_cache=True)  # fmt: skip
    return cache


def _score(
    model: PreTrainedModel, head: Head | None, cache: DynamicCache, before: Sequence[int], batch: Sequence[Tokens]
) -> list[tuple[float, bool]]:
    """See `log_likelihoods`, of some answers, each led by its question's last token.

    Args:
        model: see `log_likelihoods`.
        head: see `split_head`.
        cache: what was read before, a row an answer; added to.
        before: tokens of each row that are no padding.
        batch: the answers.
    """
    padded = max(len(tokens) for tokens in batch) - 1
    ids = torch.tensor([[*tokens[:-1], *[0] * (padded - len(tokens) + 1)] for tokens in batch])
    read = torch.arange(padded) < torch.tensor([[len(tokens) - 1] for tokens in batch])
    mask = torch.cat((_left_padded(before, cache.get_seq_length()), read.long()), dim=1).to(model.device)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    inputs["position_ids"] = _positions(mask)[:, -padded:]
    run = model.base_model(**inputs).last_hidden_state if head else model(**inputs).logits
    targets = torch.tensor([token for tokens in batch for token in tokens[1:]], device=model.device)
    scores, greedy = _at_targets(run[read.to(model.device)], targets, head, tokens_at_a_time(model))
    counts = [len(tokens) - 1 for tokens in batch]
    return [
        (float(score.sum()), bool(best.all()))
        for score, best in zip(scores.split(counts), greedy.split(counts), strict=True)
    ]


def _at_targets(run: Tensor, targets: Tensor, head: Head | None, piece: int) -> tuple[Tensor, Tensor]:
    """Log probability of each target, float32 (N,), and whether it is the likeliest, bool (N,).

    `run` is what the head takes, (N, d), or logits, (N, V), without one; `piece` targets at a time have logits.
    """
    scores, greedy = [], []
    for hidden, target in zip(run.split(piece), targets.split(piece), strict=True):
        logits = (head(hidden) if head else hidden).float()
        scores.append(logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0])
        greedy.append(logits.argmax(dim=-1) == target)
    return torch.cat(scores), torch.cat(greedy)


def _left_padded(lengths: Sequence[int], padded: int) -> Tensor:
    """int64 (B, padded), 1 at the last tokens of each row."""
    return (torch.arange(padded) >= padded - torch.tensor(lengths)[:, None]).long()


def _positions(mask: Tensor) -> Tensor:
    """Places of tokens, counted without padding, which gets 0."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
