"""Fixtures for the doctor's tests: an installation whose parts are well, for tests to break."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from gateway_app.doctor.finding import Examine, Finding
from tasks.settings import settings
from tests.services import RedisServer

Find = Callable[[Examine], dict[str, Finding]]


@pytest.fixture
def find() -> Find:
    """Return a function that runs an examination on the settings as they are now, and gives its findings by name."""

    def run(examine: Examine) -> dict[str, Finding]:
        settings.cache_clear()
        found = list(examine(settings()))
        names = [finding.name for finding in found]
        assert len(names) == len(set(names)), names
        for finding in found:
            assert (finding.status in ("fail", "warn")) <= bool(finding.remedy), finding
        return {finding.name: finding for finding in found}

    return run


@pytest.fixture(scope="module")
def breakable_redis() -> Iterator[RedisServer]:
    """Return a Redis for the tests of one module, which put back what they change."""
    with RedisServer() as server:
        yield server
