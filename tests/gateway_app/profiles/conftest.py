"""What the tests of warming in this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from flask.testing import FlaskClient

from tests.warm_fleet import Fleet


@pytest.fixture
def fleet(client: FlaskClient, redis_url: str) -> Iterator[Fleet]:
    """Return the fleet of the gateway's Redis, in which no worker is yet."""
    del client
    with redis.Redis.from_url(redis_url) as connection:
        yield Fleet(connection)
