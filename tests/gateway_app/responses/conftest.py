"""A gateway process with a simulated worker, and OpenAI's client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.fleet import Fleet
from tests.fleet import fleet as start_fleet
from tests.responding import TOKENS


@pytest.fixture(scope="package")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Fleet]:
    """Return a gateway process with a worker, shared by this folder's tests."""
    options = f'{{"answer_tokens": {TOKENS}}}'
    with start_fleet(tmp_path_factory.mktemp("fleet"), tiny_model, ENGINE__OPTIONS=options) as made:
        yield made


@pytest.fixture
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    """Return the client as a team would make it."""
    with fleet.client() as client:
        yield client
