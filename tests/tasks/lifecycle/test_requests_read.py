"""Reading requests: each organization its own, page by page, on both databases."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Engine

from tasks import requests_read
from tasks.ids import new_request_id
from tasks.tracing.context import CONTEXT_MAX
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


def test_an_attempt_that_was_lost(engine: Engine) -> None:
    """It is one that began, and of which nothing more was heard."""
    request = Request(engine)

    def lost(number: int) -> Any:
        return request.do(lambda connection: requests_read.lost_attempt(connection, request.id, number))

    first = request.begun("gpu-1")
    second = request.begun("gpu-2")
    assert (lost(1).worker, lost(1).epoch) == ("gpu-1", first.epoch)
    assert lost(1).occurred_at <= lost(2).occurred_at
    assert request.give_back(second) == "queued"
    assert [lost(2), lost(3)] == [None, None]


def test_the_trace_of_a_request_is_kept(engine: Engine) -> None:
    """Publishing it again goes on with it."""
    context = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01 " + "v" * 512
    request = Request(engine, trace_context=context)
    assert len(context) == CONTEXT_MAX
    again = request.republish()
    assert again is not None
    assert again.trace_context == context
