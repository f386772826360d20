"""The client of the chaos scenarios asks again, resumes and drops text as it should, against a server that plays tricks."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

import aiohttp
from aiohttp import web

from bench.chaoslab.asking import Client, Question, Told
from tests.services import free_port

QUESTION = Question("What now?", 4)
#: A frame as (id, event, data).
Frame = tuple[str, str, dict[str, object]]
STARTED: Frame = ("1-0", "started", {"attempt": 1})
END: Frame = ("1-3", "completed", {})


def delta(cursor: str, text: str) -> Frame:
    """Return a frame with text."""
    return cursor, "delta", {"text": text}


class Trickster:
    """A gateway that answers submissions with `statuses` in turn, and each reader with the next of `parts`."""

    def __init__(self, statuses: Sequence[int], parts: Sequence[Sequence[Frame] | int]) -> None:
        self._statuses = list(statuses)
        self._parts = list(parts)
        self.keys: list[str] = []
        self.cursors: list[str | None] = []

    async def submit(self, request: web.Request) -> web.Response:
        """Answer a submission."""
        self.keys.append(request.headers["Idempotency-Key"])
        status = self._statuses.pop(0)
        return web.json_response({"id": "gw_1"}, status=status, headers={"Retry-After": "1"})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Send a part of the stream, then hang up."""
        self.cursors.append(request.headers.get("Last-Event-ID"))
        part = self._parts.pop(0)
        if isinstance(part, int):
            return web.Response(status=part)
        answer = web.StreamResponse()
        await answer.prepare(request)
        for cursor, event, data in part:
            await answer.write(
                f"id: {cursor}\nevent: {event}\ndata: {json.dumps(data)}\n\n: still working\n\n".encode()
            )
        # What comes after the last frame never became whole.
        await answer.write(b"id: 9-9\nevent: del")
        return answer

    async def asked(self, *, persistent: bool) -> Told:
        """Serve one client; return what it was told."""
        app = web.Application()
        app.router.add_post("/v1/tasks", self.submit)
        app.router.add_get("/v1/tasks/gw_1/events", self.stream)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port := free_port()).start()
        told = Told(QUESTION)
        try:
            async with aiohttp.ClientSession() as session:
                await Client(session, [f"http://127.0.0.1:{port}"], random.Random(1), persistent=persistent).ask(told)
        finally:
            await runner.cleanup()
        return told


def ask(server: Trickster, *, persistent: bool = True) -> Told:
    """Have one client ask its question."""
    return asyncio.run(server.asked(persistent=persistent))


def test_a_cut_stream_is_resumed_where_it_was_cut() -> None:
    """The second connection says which frame came last, and the text is whole."""
    server = Trickster([202], [[STARTED, delta("1-1", "the ")], 503, [delta("1-2", "queue "), END]])
    told = ask(server)
    assert (told.event, told.text, told.resumed, told.faults) == ("completed", "the queue ", 2, [])
    assert server.cursors == [None, "1-1", "1-1"]


def test_a_reset_drops_the_text() -> None:
    """The answer begins again with another attempt."""
    again: list[Frame] = [("2-0", "reset", {"attempt": 2}), delta("2-1", "the "), ("2-2", "completed", {})]
    told = ask(Trickster([202], [[STARTED, delta("1-1", "the "), *again]]))
    assert (told.text, told.resets, told.faults) == ("the ", 1, [])


def test_a_frame_that_comes_twice_is_a_fault() -> None:
    """A gateway that sends again what the client has seen would double the text."""
    told = ask(Trickster([202], [[STARTED, delta("1-1", "the ")], [delta("1-1", "the "), END]]))
    assert told.faults == ["frame 1-1 came after 1-1"]


def test_an_end_that_was_never_seen_is_a_fault() -> None:
    """204 says that the client has seen everything, which it has not."""
    told = ask(Trickster([202], [[STARTED], 204]))
    assert told.event is None
    assert told.faults == ["reading was answered 204 after 1-0"]


def test_submitting_again_uses_the_same_key() -> None:
    """A client that is told to come back does, under the key that makes its request one."""
    server = Trickster([503, 429, 202], [[STARTED, END]])
    told = ask(server)
    assert told.refusals == [(503, "1"), (429, "1")]
    assert len(server.keys) == 3
    assert len(set(server.keys)) == 1


def test_some_take_a_refusal_for_an_answer() -> None:
    """Under overload clients go away when they are told to."""
    told = ask(Trickster([429], []), persistent=False)
    assert (told.request_id, told.refusals, told.faults) == (None, [(429, "1")], [])


def test_any_other_answer_is_a_fault() -> None:
    """A well-formed request is taken or refused for now, and nothing else."""
    told = ask(Trickster([404], []))
    assert told.faults == ['submitting was answered 404: {"id": "gw_1"}']
