"""The events of a response: right for OpenAI's client, and the same from wherever they are read on."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from gateway_app.openai.response_events import BEFORE, LAST, Event, Events
from gateway_app.openai.responses import completed, outset, response
from tasks.errors import AnswerChanged, InvalidCursor
from tasks.job import FinishReason, Piece, Result, TaskRequest, Timings, ToolCallDelta, Usage
from tasks.stream import Frame, ended, replay

REQUEST_ID = "gw_019d0c3a5b7e7c21a4f06d1e8b3c9f52"
AT = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
TYPED: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TEXT = (Piece(text="One "), Piece(text="two thrée "), Piece(text="🙂"))
CALLS = (
    Piece(text="Let me look.\n"),
    Piece(tool_calls=(ToolCallDelta(index=0, id="call-a", name="look", arguments='{"at":'),)),
    Piece(tool_calls=(ToolCallDelta(index=0, arguments=' "db-1"}'), ToolCallDelta(index=1, id="b", name="now"))),
    Piece(text="\n", tool_calls=(ToolCallDelta(index=1, arguments="{}"),)),
)


def result(pieces: tuple[Piece, ...], reason: FinishReason | None = "stop") -> Result:
    """Return an answer of these pieces."""
    usage = Usage(prompt_tokens=9, cached_tokens=4, output_tokens=7)
    reasons = (reason,) if reason else ()
    timings = Timings(queued_ms=1, total_ms=2)
    return Result(pieces=pieces, finish_reasons=reasons, model="tiny", usage=usage, timings=timings)


def events(
    answer: Result | None,
    frames: list[Frame | None],
    after: int = BEFORE,
    *,
    state: str = "completed",
    background: bool = True,
) -> list[Event | None]:
    """Return the events of a finished request, read from `frames`."""
    row: Any = SimpleNamespace(
        request_id=REQUEST_ID, state=state, created_at=AT, finished_at=AT, priority="normal", error_code="engine_failed"
    )
    asked = {"model": "incident-responder", "background": background}
    task = TaskRequest(api="responses", messages=({"role": "user", "content": "?"},), asked=asked)
    made = Events(
        REQUEST_ID,
        background=background,
        outset=lambda status: outset(row, task, status),
        completed=lambda result: completed(row, task, result),
        ended=lambda: response(row, task, answer),
    )
    return list(made.after(after, frames))


def whole(answer: Result, attempt: int = 1) -> list[Frame | None]:
    """Return an answered request's frames."""
    return list(replay(attempt, answer))


def kinds(made: list[Event | None]) -> list[str]:
    """Return the events' types, without what all have in common."""
    return [event["type"].removeprefix("response.") for event in made if event]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("pieces", [TEXT, CALLS, (), CALLS[1:], CALLS[1:3]])
def test_the_client_understands_every_event(pieces: tuple[Piece, ...], background: bool) -> None:
    """Each is valid by the client's own types, and its accumulator ends with the recorded answer."""
    answer = result(pieces)
    made = events(answer, whole(answer), background=background)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=(), text_format=openai.omit)
    numbers = []
    for event in made:
        assert event is not None
        typed = TYPED.validate_python(event)
        assert typed.type == event["type"]
        numbers.append(typed.sequence_number)
        state.handle_event(typed)
    assert numbers == list(range(len(made)))
    final = state._completed_response
    assert final is not None
    assert final.output_text == answer.text
    assert [item.to_dict() for item in final.output if item.type == "function_call"] == [
        {
            "id": f"fc_{REQUEST_ID[3:]}_{index}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "parsed_arguments": None,
        }
        for index, call in enumerate(answer.choices[0].tool_calls)
    ]


def test_the_order_of_a_text() -> None:
    """As OpenAI documents it; a stream that somebody waits for is never queued."""
    answer = result(TEXT)
    expected = [
        *("output_item.added", "content_part.added", *["output_text.delta"] * 3),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert kinds(events(answer, whole(answer))) == ["created", "queued", "in_progress", *expected]
    assert kinds(events(answer, whole(answer), background=False)) == ["created", "in_progress", *expected]


def test_an_answer_that_was_cut_is_incomplete() -> None:
    """The last event says so, and why, and so does the item."""
    answer = result(TEXT, "length")
    last = events(answer, whole(answer))[-1]
    assert last is not None
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


@settings(deadline=None)
@given(data=st.data(), background=st.booleans(), pieces=st.sampled_from([TEXT, CALLS, ()]))
def test_what_follows_any_number_is_the_rest(data: st.DataObject, background: bool, pieces: tuple[Piece, ...]) -> None:
    """After the last there is nothing; after one that does not exist, an error. Silences stay where they are."""
    answer = result(pieces)
    frames: list[Frame | None] = []
    for frame in whole(answer):
        frames += [None] * data.draw(st.integers(0, 2)) + [frame]
    made = [event for event in events(answer, frames, background=background) if event]
    after = data.draw(st.integers(0, len(made) - 1))
    rest = [event for event in events(answer, frames, after, background=background) if event]
    assert rest == made[after + 1 :]
    with pytest.raises(InvalidCursor):
        events(answer, frames, len(made), background=background)


def test_another_attempt_that_says_the_same() -> None:
    """It goes on where the first one was cut off, however its text is divided."""
    answer = result((Piece(text="One tw"), Piece(text="o thrée "), Piece(text="🙂")))
    lost = whole(result(TEXT))[:3]
    made = events(answer, lost + whole(answer, 2))
    deltas = [event["delta"] for event in made if event and event["type"] == "response.output_text.delta"]
    assert deltas == ["One ", "two thrée ", "🙂"]
    assert kinds(made)[-1] == "completed"


def test_another_attempt_that_says_something_else() -> None:
    """Differing, shorter, or with another call id: the stream ends with an error, not with a lie."""
    lost = whole(result(CALLS))[:-1]
    other_id = Piece(tool_calls=(ToolCallDelta(index=0, id="other", name="look", arguments='{"at": "db-1"}'),))
    for pieces in (TEXT, CALLS[:1], (CALLS[0], other_id, *CALLS[3:])):
        answer = result(pieces)
        with pytest.raises(AnswerChanged):
            events(answer, lost + whole(answer, 2))


def test_the_numbers_of_a_forgotten_attempt_are_refused() -> None:
    """SQL knows only the last attempt, whose text may be divided otherwise; reading from the start is right."""
    answer = result(TEXT)
    made = events(answer, whole(answer, 2))
    assert kinds(made)[-1] == "completed"
    for after in (0, 1, 2):
        assert events(answer, whole(answer, 2), after) == made[after + 1 :]
    for after in (3, 4, LAST):
        with pytest.raises(InvalidCursor):
            events(answer, whole(answer, 2), after)


@pytest.mark.parametrize(
    ("state", "kind", "status"),
    [
        ("failed", "failed", "failed"),
        ("expired", "failed", "failed"),
        ("dead", "failed", "failed"),
        ("cancelled", "incomplete", "cancelled"),
    ],
)
def test_an_end_without_an_answer_is_the_same_from_sql(state: str, kind: str, status: str) -> None:
    """How much text came before is forgotten with Redis, so the last number is the highest."""
    text = whole(result(TEXT))[:-1]
    end = ended(1, state, "engine_failed" if state == "failed" else state)
    full, short = events(None, [*text, end], state=state), events(None, [end], state=state)
    assert full[:3] + full[-1:] == short
    last = full[-1]
    assert last is not None
    TYPED.validate_python(last)
    assert (last["sequence_number"], last["type"]) == (LAST, f"response.{kind}")
    assert last["response"]["status"] == status
    assert (last["response"]["error"] is not None) == (status == "failed")
    for after in range(len(full) + 2):
        assert events(None, [end], after, state=state)[-1] == last
    assert events(None, [end], LAST, state=state) == []
    queued = events(None, [ended(0, state, "cancelled")], state=state)
    assert kinds(queued) == ["created", "queued", kind]


def test_a_cancelled_answer_shows_what_was_said() -> None:
    """As SQL has it, whatever the stream still holds."""
    partial = result(TEXT, None)
    last = events(partial, [ended(1, "cancelled", "cancelled")], state="cancelled")[-1]
    assert last is not None
    (item,) = last["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", partial.text)
