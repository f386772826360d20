"""Fixtures of the queue's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tasks.queueing.broker import Broker, configured


@pytest.fixture
def lease_s() -> float:
    """Return the length of a lease, in seconds; tests that need a short one override it."""
    return 60.0


@pytest.fixture
def broker(redis_url: str, lease_s: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """Return the queue in an empty Redis, whose invariant must hold in the end."""
    with configured(redis_url, lease_s, monkeypatch) as made:
        yield made
        made.check()
