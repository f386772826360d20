"""`/v1/audit`: the record of one's own organization, a page at a time or whole. Any key of it may read it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from itertools import chain
from typing import Any, Literal

from flask import Blueprint, Response, g
from pydantic import Field

from gateway_app.api import reading
from gateway_app.api.attachment import attach
from gateway_app.api.pages import listing
from gateway_app.audit import events
from gateway_app.audit.events import Selection
from gateway_app.audit.export import MEDIA_TYPES, Format, export
from gateway_app.audit.trail import EVENT_NAME, EventName, Row, contract_event
from gateway_app.audit.trail_file import file_name
from gateway_app.governance.api_keys import ApiKeys
from tasks.db import Database, now
from tasks.errors import FollowRefused, InvalidRequest, TooManyExports
from tasks.ids import PATTERN
from tasks.job import Frozen, Instant, Name

Kind = Literal[
    "received",
    "vetoed",
    "admitted",
    "started",
    "requeued",
    "completed",
    "failed",
    "cancelled",
    "expired",
    "dead",
    "policy_changed",
    "profile_changed",
]


class Period(Frozen):
    """Which time is meant."""

    since: Instant | None = Field(default=None, description="The first instant; left out, from the beginning.")
    until: Instant | None = Field(default=None, description="The instant before which it ends; left out, now.")

    def bounds(self) -> tuple[datetime | None, datetime | None]:
        """Return both instants, in UTC."""
        since, until = (None if moment is None else events.in_utc(moment) for moment in (self.since, self.until))
        return since, until


class EventQuery(Period):
    """Which events a page shows."""

    kind: Kind | None = Field(default=None, description="What was recorded.")
    request_id: str | None = Field(default=None, pattern=f"^{PATTERN}$", description="Of which request.")
    agent: Name | None = None
    order: Literal["asc", "desc"] = Field(default="desc", description="`desc`: the newest first.")
    after: str | None = Field(default=None, pattern=f"^{EVENT_NAME}$", description="The last id of the page before.")
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE)


class ExportQuery(Period):
    """What is exported, and how it is written."""

    format: Format = "jsonl"


def blueprint(keys: ApiKeys, database: Database, max_exports: int) -> Blueprint:
    """Return the routes, over what they need. `max_exports` may run at once."""
    routes = Blueprint("audit", __name__, url_prefix="/v1/audit")
    running = threading.BoundedSemaphore(max_exports)

    reading.require_key(routes, keys)

    @routes.get("/events")
    def index() -> Response:
        wanted = reading.query(EventQuery)
        organization, limit = g.caller.organization, wanted.limit
        selection = Selection(organization, *wanted.bounds(), wanted.kind, wanted.request_id, wanted.agent)
        last = None
        if wanted.after is not None:
            name = EventName.parse(wanted.after)
            last = database.read(lambda connection: events.find(connection, organization, name)) if name else None
            if last is None:
                problem = {"field": "after", "message": "no event of this organization has this id"}
                raise InvalidRequest("after is not the id of an event", errors=[problem])
        found = database.read(
            lambda connection: events.page(connection, selection, last, limit + 1, newest_first=wanted.order == "desc")
        )
        return listing(found, limit, _shown)

    @routes.get("/export")
    def whole() -> Response:
        wanted = reading.query(ExportQuery)
        since, until = wanted.bounds()
        selection = Selection(g.caller.organization, since, until or now())
        if not running.acquire(blocking=False):
            raise TooManyExports
        try:
            chunks = _chunks(database, selection, wanted.format)
        except BaseException:
            running.release()
            raise
        # Where the database fails later, the response breaks off: a client finds that it has no end.
        response = Response(chunks, content_type=f"{MEDIA_TYPES[wanted.format]}; charset=utf-8")
        response.call_on_close(running.release)
        attach(response, _file_name(selection.organization, wanted.format))
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    return routes


def _shown(row: Row) -> dict[str, Any]:
    return {"id": str(EventName.of(row)), **contract_event(row)}


def _chunks(database: Database, selection: Selection, form: Format) -> Iterator[bytes]:
    """Return the export's chunks. The first events are read at once, so that failing at them is an answer."""
    written = (content for content, _ in export(database, selection, form))
    first = [content for _, content in zip(range(2 if form == "csv" else 1), written, strict=False)]
    return chain(first, written)


def _file_name(organization: str, form: Format) -> str:
    """Return what the download is called: MetaQore's name, or a plain one where that cannot be."""
    with suppress(FollowRefused):
        return file_name(organization).removesuffix("jsonl") + form
    return f"compliance_audit.{form}"
