"""`/v1/responses`, as OpenAI's clients expect it: waited for, streamed, or left to run in the background.

The record of a request is immutable, and so there is no DELETE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from flask import Blueprint, Response, g, jsonify, request
from pydantic import Field
from sqlalchemy.engine import Row

from gateway_app.api import reading, sse
from gateway_app.cancelling import Canceller
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.openai.response_body import ResponseBody
from gateway_app.openai.response_events import BEFORE, LAST, Event, Events
from gateway_app.pipeline import Pipeline
from gateway_app.responses import Responses
from gateway_app.streaming import presence
from gateway_app.synchronous import Synchronous
from tasks.errors import GatewayError, InvalidRequest, Unsupported
from tasks.job import Frozen, TaskRequest
from tasks.schema import TERMINAL_STATES
from tasks.stream import START, Frame


class RetrieveQuery(Frozen):
    """How a response is read."""

    stream: bool = False
    starting_after: int | None = Field(
        default=None, ge=0, le=LAST, description="With stream: the sequence_number of the last event that was seen."
    )
    include_obfuscation: bool = False


class ItemsQuery(Frozen):
    """Which page of a response's input a list shows."""

    after: str | None = Field(default=None, description="The last id of the page before.")
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE)
    order: Literal["asc", "desc"] = "desc"


def blueprint(
    keys: ApiKeys, pipeline: Pipeline, synchronous: Synchronous, canceller: Canceller, tool_parser: str | None
) -> Blueprint:
    """Return the routes, over what they need."""
    responses = Blueprint("responses", __name__, url_prefix="/v1/responses")
    stored = Responses(synchronous.watcher)
    maker = _Maker(pipeline, synchronous, stored, tool_parser)

    reading.require_key(responses, keys)

    @responses.post("")
    def create() -> Response:
        content, key = reading.submission(pipeline)
        return maker.make(content, key)

    @responses.get("/<response_id>")
    def retrieve(response_id: str) -> Response:
        row, wanted = stored.find(response_id, g.caller.organization), reading.query(RetrieveQuery)
        if wanted.include_obfuscation:
            raise Unsupported("streams are not obfuscated", param="include_obfuscation")
        if wanted.starting_after is not None and not wanted.stream:
            raise InvalidRequest("starting_after wants stream to be true", param="starting_after")
        if wanted.stream:
            return _resumed(stored, synchronous, row, wanted.starting_after)
        return jsonify(stored.show(row))

    @responses.post("/<response_id>/cancel")
    def cancel(response_id: str) -> Response:
        row = stored.find(response_id, g.caller.organization)
        return jsonify(stored.show(canceller.cancel(row.request_id, row.organization)))

    @responses.get("/<response_id>/input_items")
    def items(response_id: str) -> Response:
        row, wanted = stored.find(response_id, g.caller.organization), reading.query(ItemsQuery)
        return jsonify(_page(stored.input(row), wanted))

    return responses


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes responses of what clients ask for."""

    pipeline: Pipeline
    synchronous: Synchronous
    stored: Responses
    tool_parser: str | None

    def make(self, content: bytes, key: str | None) -> Response:
        """Take the request in, and answer as it asks to be answered."""
        asked: list[ResponseBody] = []

        def read() -> TaskRequest:
            asked.append(ResponseBody.read(reading.parse(content)))
            return asked[0].request(
                request.headers.items(),
                self.pipeline.model_name,
                self.tool_parser,
                lambda earlier: self.stored.continued(earlier, g.caller.organization),
            )

        accepted = self.pipeline.submit(g.caller, read, self.pipeline.idempotency(key, content))
        row = self.stored.find(accepted.request_id, g.caller.organization)
        answer = self._answer(asked[0], row)
        answer.headers["X-Request-Id"] = accepted.request_id
        if accepted.repeated:
            answer.headers["Idempotent-Replayed"] = "true"
        return answer

    def _answer(self, body: ResponseBody, row: Row[Any]) -> Response:
        if body.stream:
            events = self.stored.events(row)
            if body.background:
                return self.synchronous.watch(row, START, lambda frames: _sent(events, BEFORE, frames))
            return self.synchronous.stream(row, lambda frames: _sent(events, BEFORE, frames))
        if not body.background:
            self.synchronous.result(row, presence.watch(request.environ))
            row = self.stored.find(row.request_id, row.organization)
        return jsonify(self.stored.show(row))


def _resumed(stored: Responses, synchronous: Synchronous, row: Row[Any], starting_after: int | None) -> Response:
    """Answer with a response's events from a number on."""
    after = BEFORE if starting_after is None else starting_after
    if row.state in TERMINAL_STATES:
        # All of it is here, so what is wrong with it is said before the stream begins.
        frames = list(stored.watcher.frames(row, START))
        return sse.respond([_of_event(event) for event in stored.finished_events(row, after, frames)])
    events = stored.events(row)
    return synchronous.watch(row, START, lambda frames: _sent(events, after, frames))


def _sent(events: Events, after: int, frames: Iterable[Frame | None]) -> Iterator[bytes]:
    """Yield what a client is sent while the answer is made; an error comes last, in the stream."""
    if after != BEFORE:
        # A first line at once, so that the client has its headers before the next event.
        yield sse.HEARTBEAT
    try:
        yield from map(_of_event, events.after(after, frames))
    except GatewayError as error:
        # The number of the event before, so that whoever comes back with it misses nothing.
        number = max(events.next_number - 1, after)
        facts = {"code": error.code, "message": error.detail, "param": error.extensions.get("param")}
        yield _of_event({"type": "error", "sequence_number": number, **facts})


def _of_event(event: Event | None) -> bytes:
    return sse.HEARTBEAT if event is None else sse.event(event, name=event["type"])


def _page(items: list[dict[str, Any]], wanted: ItemsQuery) -> dict[str, Any]:
    """Return one page of a list of items. Raises InvalidRequest if it is to begin after none of them."""
    if wanted.order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if wanted.after is not None and wanted.after not in ids:
        raise InvalidRequest("after is not the id of an input item of this response", param="after")
    start = 0 if wanted.after is None else ids.index(wanted.after) + 1
    page = items[start : start + wanted.limit]
    edges = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **edges, "has_more": len(items) > start + wanted.limit}
