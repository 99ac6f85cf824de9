"""lm-evaluation-harness: hands it a model that is open already, packed or dense.

Only the functions here import the harness, which is an optional dependency (lm-eval).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arbllm.errors import ConfigError

OnRequest = Callable[[int, int], None]
# (tokens of a question, tokens of an answer) of every request, tokens that the model takes at once
# -> log likelihood of every answer, and whether it is what the model would write
Score = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]], int], list[tuple[float, bool]]]


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]],
    *,
    score: Score | None = None,
    limit: int | None = None,
    on_request: OnRequest | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness zero-shot.

    Args:
        model: a causal LM, in its evaluation dtype and on its device.
        tokenizer: its tokenizer.
        tasks: names of the harness, or task configurations as dicts.
        score: scores answers, and reports progress itself; None leaves it to the harness, one answer at a time.
        limit: items of each task at most; None for all.
        on_request: without `score`, called with (requests done, requests in all); a request is one answer to one item.

    Returns:
        What `lm_eval.simple_evaluate` returns, without samples.

    Raises:
        ConfigError: the harness is not installed, or the tokenizer has no token that texts begin with.
    """
    check_harness()
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError("tasks need a tokenizer with a token for the beginning of a text, or for its end")
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that it takes
    lm = _wrap(model, tokenizer, score, on_request)
    own = any(isinstance(task, str) for task in tasks)
    manager = _own_tasks() if own else TaskManager(include_defaults=False)
    options: dict[str, Any] = {"num_fewshot": 0, "limit": limit, "log_samples": False, "task_manager": manager}
    with patch("lm_eval.evaluator.get_git_commit_hash"):  # git complains on stderr outside of a repository
        results = lm_eval.simple_evaluate(lm, tasks=list(tasks), **options)
    assert results, "there is one process alone"
    return results


def check_harness() -> None:
    """Refuse to go on without the harness.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("tasks need lm-evaluation-harness: pip install lm-eval")


def check_names(tasks: Sequence[str]) -> None:
    """Refuse names of the harness that are not those of single tasks with answers to choose from.

    Raises:
        ConfigError: names the task, and what could be meant.
    """
    manager = _own_tasks()
    for task in tasks:
        entry = manager.task_index.get(task)
        if entry is None:
            close = get_close_matches(task, manager.all_subtasks, 3)
            hint = f"; is {' or '.join(close)} meant?" if close else "; lm-eval ls tasks lists all"
            raise ConfigError(f"task {task!r} is unknown to lm-evaluation-harness{hint}")
        settings = entry.cfg or {}
        if task not in manager.all_subtasks:
            parts = sorted(entry.tags) or [part for part in settings.get("task", ()) if isinstance(part, str)]
            raise ConfigError(f"{task} is a group of tasks; name those that are wanted: {', '.join(parts[:8])}")
        if str(settings.get("output_type", "")).startswith("generate"):
            raise ConfigError(f"task {task} wants text to be written; choose tasks with answers to choose from")


@cache
def _own_tasks() -> Any:
    """The harness's thousands of tasks, which it takes seconds to look through."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, score: Score | None, on_request: OnRequest | None
) -> Any:
    """The harness's model class around ours."""
    from lm_eval.models.huggingface import HFLM

    class OpenModel(HFLM):
        def loglikelihood(self, requests: Sequence[Any], *_: Any, **__: Any) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Sequence[Any], *_: Any, **__: Any) -> Any:
            if score:
                return score([(question, answer) for _, question, answer in requests], self.max_length)
            self.cache_hook = _Progress(len(requests), on_request)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)

    return OpenModel(pretrained=model, tokenizer=tokenizer, batch_size=1)


class _Progress:
    """Stands where the harness would put answers into a cache: it is told of each as it is known."""

    def __init__(self, total: int, on_request: OnRequest | None) -> None:
        self.done, self.total, self.on_request = 0, total, on_request

    def add_partial(self, *_: Any) -> None:
        self.done += 1
        if self.on_request:
            self.on_request(self.done, self.total)
