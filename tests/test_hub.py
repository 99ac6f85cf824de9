import time

import huggingface_hub
import pytest

from arbllm.hub import hub_is_reachable


class Session:
    def __init__(self, error: Exception | None = None):
        self.error = error
        self.asked: list[tuple[str, float]] = []

    def head(self, address: str, timeout: float) -> None:
        self.asked.append((address, timeout))
        if self.error:
            raise self.error


def test_an_answer_of_any_kind_will_do(monkeypatch):
    session = Session()
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    assert hub_is_reachable(timeout=3)
    assert session.asked == [(huggingface_hub.constants.ENDPOINT, 3)]


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError(), RuntimeError("of a new library")])
def test_any_error_means_out_of_reach(monkeypatch, error):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Session(error))
    assert not hub_is_reachable()


def test_a_hub_that_is_not_there_is_given_up_within_seconds(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.invalid")
    start = time.perf_counter()
    assert not hub_is_reachable(timeout=2)
    assert time.perf_counter() - start < 10
