"""Reading requests: each organization its own, page by page, on both databases."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Engine

from tasks import requests_read
from tasks.ids import new_request_id
from tests.tasks.lifecycle.admitted import Request


def test_requests_belong_to_their_organization(engine: Engine) -> None:
    """Another organization finds nothing."""
    request = Request(engine)
    assert request.do(lambda connection: requests_read.find(connection, request.id, "acme")).request_id == request.id

    def found_by(organization: str) -> Any:
        return request.do(lambda connection: requests_read.find(connection, request.id, organization))

    assert [found_by(organization) for organization in ("globex", "", "ACME")] == [None] * 3


def test_a_page_is_the_newest_of_an_organization(engine: Engine) -> None:
    """From the newest to the oldest, page by page, with those that fit and nobody else's."""
    organization = new_request_id()
    made = [Request(engine, organization=organization, priority=word) for word in ("low", "high", "low", "low")]
    Request(engine)
    ids = [request.id for request in reversed(made)]

    def page(after: str | None = None, limit: int = 10, **filters: str) -> list[str]:
        with engine.connect() as connection:
            return [row.request_id for row in requests_read.page(connection, organization, filters, after, limit)]

    assert page() == ids
    assert page(limit=3) == ids[:3]
    assert page(after=ids[1], limit=1) == [ids[2]]
    assert page(after=ids[-1]) == []
    assert page(priority="low") == [ids[0], ids[1], ids[3]]
    assert page(priority="low", state="queued", after=ids[0], limit=1) == [ids[1]]
    assert page(state="running") == []
