"""Responses in the background: left alone, read on from anywhere, cancelled, and not lost with a gateway."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest

from tests.fleet import Fleet
from tests.responding import AGENT, ask, checked, finished, raw, stream


def test_in_the_background(client: openai.OpenAI) -> None:
    """Queued at once; polled to its end."""
    made = ask(client, background=True)
    assert made.status in ("queued", "in_progress")
    assert (made.background, made.output, made.usage) == (True, [], None)
    done = finished(client, made)
    assert (done.status, done.output_text) == ("incomplete", ask(client).output_text)


def test_every_event_is_a_place_to_go_on_from(fleet: Fleet, client: openai.OpenAI) -> None:
    """Byte for byte the same, from Redis and from SQL; a number that does not exist is refused."""
    events = stream(client, background=True, max_output_tokens=40)
    response_id = events[0].response.id
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    whole = raw(fleet, response_id)
    assert len(whole) == len(events)
    for after in range(len(whole)):
        assert raw(fleet, response_id, after) == whole[after + 1 :]
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.retrieve(response_id, stream=True, starting_after=len(whole))
    assert raised.value.code == "invalid_cursor"
    fleet.forget(response_id)
    for after in range(len(whole)):
        assert raw(fleet, response_id, after) == whole[after + 1 :]
    resumed = checked(client.responses.retrieve(response_id, stream=True, starting_after=2))
    assert resumed == events[3:]
    assert client.responses.retrieve(response_id).to_dict() == events[-1].response.to_dict()


def test_many_readers_while_it_is_written(fleet: Fleet, client: openai.OpenAI) -> None:
    """Whoever goes on from anywhere in the middle of the stream gets the rest, to the end."""
    found: dict[int, list[str]] = {}
    readers: list[threading.Thread] = []

    def read(response_id: str, after: int) -> None:
        found[after] = raw(fleet, response_id, after)

    events = client.responses.create(
        model=AGENT, input="Tell me more.", background=True, stream=True, max_output_tokens=150
    )
    first = next(events)
    assert first.type == "response.created"
    for event in events:
        if event.sequence_number in (3, 5, 8, 11):
            readers.append(threading.Thread(target=read, args=(first.response.id, event.sequence_number)))
            readers[-1].start()
    for reader in readers:
        reader.join()
    whole = raw(fleet, first.response.id)
    assert len(found) == len(readers) > 1
    for after, rest in found.items():
        assert rest == whole[after + 1 :]


def test_redis_that_forgets_in_the_middle(fleet: Fleet, client: openai.OpenAI) -> None:
    """Who reads on, or begins to read, waits for what is missing instead of going on without it."""
    events = client.responses.create(
        model=AGENT, input="Tell me all.", background=True, stream=True, max_output_tokens=150
    )
    first = next(events)
    assert first.type == "response.created"
    assert any(event.type == "response.output_text.delta" for event in events)
    fleet.forget(first.response.id)
    begun = raw(fleet, first.response.id)
    resumed = raw(fleet, first.response.id, 5)
    assert len(client.responses.retrieve(first.response.id).output_text) > 100
    fleet.forget(first.response.id)
    whole = raw(fleet, first.response.id)
    assert begun == whole
    assert resumed == whole[6:]


@pytest.mark.parametrize(("background", "status"), [(True, "incomplete"), (False, "cancelled")])
def test_a_client_that_goes_away(client: openai.OpenAI, background: bool, status: str) -> None:
    """In the background the answer goes on; otherwise nobody wants it any more."""
    tokens = 60 if background else None
    with client.responses.create(
        model=AGENT, input="Go on.", background=background, stream=True, max_output_tokens=tokens
    ) as events:
        first = next(events)
        assert first.type == "response.created"
        assert any(event.type == "response.output_text.delta" for event in events)
    assert finished(client, first.response).status == status


def test_cancelling(client: openai.OpenAI) -> None:
    """The partial answer stays; its watchers are told; cancelling again is no error, cancelling what ended is."""
    made = client.responses.create(model=AGENT, input="Tell me everything.", background=True, stream=True)
    events: list[Any] = []
    for event in made:
        events.append(event)
        if event.type == "response.output_text.delta":
            break
    cancelled = client.responses.cancel(events[0].response.id)
    events = checked([*events, *made])
    assert cancelled.status == "cancelled"
    assert events[-1].response.to_dict() == cancelled.to_dict()
    assert events[-1].type == "response.incomplete"
    assert cancelled.output_text
    assert cancelled.usage is not None
    assert client.responses.cancel(cancelled.id) == cancelled == client.responses.retrieve(cancelled.id)
    done = ask(client)
    with pytest.raises(openai.ConflictError) as raised:
        client.responses.cancel(done.id)
    assert raised.value.code == "already_finished"
    with pytest.raises(openai.ConflictError) as raised:
        ask(client, previous_response_id=cancelled.id)
    assert (raised.value.code, raised.value.param) == ("not_completed", "previous_response_id")


def test_a_gateway_that_is_killed_in_the_middle(fleet: Fleet, client: openai.OpenAI) -> None:
    """`kill -9`: another process goes on at the very next event, and nothing of the answer is lost."""
    doomed = fleet.add_gateway()
    events: list[Any] = []
    with fleet.client(doomed) as to_doomed:
        stream = to_doomed.responses.create(
            model=AGENT, input="Go on.", background=True, stream=True, max_output_tokens=200
        )
        events += [next(stream) for _ in range(8)]
        doomed.kill()
        with pytest.raises(openai.APIConnectionError):
            events.extend(stream)
    response_id = events[0].response.id
    events += client.responses.retrieve(response_id, stream=True, starting_after=events[-1].sequence_number)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events == list(client.responses.retrieve(response_id, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    done = client.responses.retrieve(response_id)
    assert (done.status, done.output_text) == ("incomplete", text)
