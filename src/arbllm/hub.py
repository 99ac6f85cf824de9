"""Whether the Hugging Face hub can be reached, found out before its clients spend half a minute on retries."""

from __future__ import annotations

TIMEOUT_SECONDS = 5.0


def is_offline_by_choice() -> bool:
    """Whether HF_HUB_OFFLINE is set: what was fetched before is to do."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_is_reachable(timeout: float = TIMEOUT_SECONDS) -> bool:
    """Whether the hub answers within `timeout` seconds; False at once when HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # the client is free to change its HTTP library; whatever this raises, the hub is out of reach
        return False
    return True
