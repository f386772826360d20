"""A MetaQore stand-in, and what asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tasks.governance.metaqore.projects import LiveProjects
from tasks.settings import MetaqoreGroup
from tests.metaqore_stand_in import StandIn

Ask = Callable[..., LiveProjects]


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """Return a running MetaQore with one project in good order, whose number is 1."""
    server = StandIn()
    server.add(1)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def ask(stand_in: StandIn) -> Iterator[Ask]:
    """Return a function that makes a LiveProjects of the stand-in, with these settings."""
    with ExitStack() as closing:

        def make(api_key: str | None = None, **settings: Any) -> LiveProjects:
            projects = LiveProjects(MetaqoreGroup(**{"url": stand_in.url, "timeout_s": 3.0, **settings}), api_key)
            closing.callback(projects.close)
            return projects

        yield make
