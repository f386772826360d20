"""However often an answer is begun again, and wherever its frames are cut, it is said exactly once and never taken back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_app.openai.steady import steady
from tasks.errors import AnswerChanged
from tasks.job import Piece, TokenLogprob, ToolCallDelta
from tasks.stream import Cursor, Frame, completed, delta, ended, opening
from tests.stand_in import result

CHOICES = 2


def logprob(text: str) -> TokenLogprob:
    """Return a token's log probability."""
    return TokenLogprob(token=text, logprob=-float(len(text)))


@st.composite
def answers(draw: st.DrawFn) -> list[Piece]:
    """Return an answer as the smallest pieces there are: a token or the part of a call, each of one choice."""
    with_logprobs, pieces = draw(st.booleans()), []
    calls = [0] * CHOICES
    for _ in range(draw(st.integers(1, 12))):
        choice = draw(st.integers(0, CHOICES - 1))
        kind = draw(st.sampled_from(["text", "call", "arguments"]))
        words = draw(st.text("ab🙂", max_size=3))
        if kind == "text":
            pieces.append(Piece(text=words, choice=choice, logprobs=(logprob(words),) if with_logprobs else ()))
            continue
        if kind == "call":
            calls[choice] += 1
        index = calls[choice] - 1
        if index >= 0:
            named = {"id": f"call_{choice}_{index}", "name": f"f{index}"} if kind == "call" else {}
            call = ToolCallDelta(index=index, arguments=words, **named)
            pieces.append(Piece(choice=choice, tool_calls=(call,)))
    return pieces


def joined(draw: Callable[[st.SearchStrategy[Any]], Any], pieces: Sequence[Piece]) -> list[Piece]:
    """Return the same with neighbours joined at random, as tokens that come close together are."""
    marks, mark = [], 0
    for before, piece in zip([None, *pieces], pieces, strict=False):
        # A text is one part of a piece, so a piece that follows a call begins anew.
        apart = before is None or before.choice != piece.choice or (before.tool_calls and not piece.tool_calls)
        mark += bool(apart) or draw(st.booleans())
        marks.append(mark)
    grouped = groupby(zip(marks, pieces, strict=True), key=lambda pair: pair[0])
    return [_join([piece for _, piece in group]) for _, group in grouped]


def _join(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        text="".join(piece.text for piece in pieces),
        choice=pieces[0].choice,
        tool_calls=tuple(call for piece in pieces for call in piece.tool_calls),
        logprobs=tuple(token for piece in pieces for token in piece.logprobs),
    )


@dataclass
class Said:
    """What a client has been told, added up as a client does."""

    text: defaultdict[Any, str] = field(default_factory=lambda: defaultdict(str))
    calls: list[tuple[int, int, str | None, str]] = field(default_factory=list)
    logprobs: defaultdict[int, list[TokenLogprob]] = field(default_factory=lambda: defaultdict(list))

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text[piece.choice] += piece.text
        self.logprobs[piece.choice] += piece.logprobs
        for call in piece.tool_calls:
            if call.name is not None:
                self.calls.append((piece.choice, call.index, call.id, call.name))
            assert (piece.choice, call.index) in {(choice, index) for choice, index, _, _ in self.calls}
            self.text[piece.choice, call.index] += call.arguments

    def facts(self) -> Any:
        """Return it without what is empty."""
        text = {key: value for key, value in self.text.items() if value}
        return text, sorted(self.calls), {key: value for key, value in self.logprobs.items() if value}


def whole(pieces: Iterable[Piece]) -> Any:
    """Return what these say."""
    said = Said()
    for piece in pieces:
        said.add(piece)
    return said.facts()


def attempt(number: int, pieces: Sequence[Piece], *, complete: bool) -> Iterator[Frame]:
    """Return an attempt's frames."""
    yield opening(number)
    for sequence, piece in enumerate(pieces, start=1):
        yield delta(Cursor(number, sequence), piece)
    if complete:
        yield completed(Cursor(number, len(pieces) + 1), result(*pieces))


@given(st.data())
def test_an_answer_is_said_once(data: st.DataObject) -> None:
    """Any number of attempts that broke off anywhere, each cut into frames in its own way, then one that did not."""
    answer = data.draw(answers())
    frames: list[Frame | None] = []
    broken = data.draw(st.lists(st.integers(0, len(answer)), max_size=3))
    for number, length in enumerate([*broken, len(answer)], start=1):
        pieces = joined(data.draw, answer[:length])
        frames += attempt(number, pieces, complete=number == len(broken) + 1)
        if data.draw(st.booleans()):
            frames.insert(data.draw(st.integers(0, len(frames) - 1)), None)
    said = Said()
    given_back = list(steady(frames))
    for item in given_back:
        if isinstance(item, Piece):
            assert item.text or item.tool_calls or item.logprobs, "a piece says nothing"
            said.add(item)
    assert said.facts() == whole(answer)
    assert given_back.count(None) == frames.count(None)
    assert given_back[-1] is frames[-1]
    assert sum(isinstance(item, Frame) for item in given_back) == 1


@given(st.lists(st.text("ab", min_size=1, max_size=2), max_size=5), st.text("ab", max_size=8), st.integers(1, 3))
def test_an_answer_that_changes(first: list[str], second: str, size: int) -> None:
    """What was said stays: a second answer that begins so goes on, any other is an error that says nothing more."""
    pieces = [Piece(text=second[at : at + size]) for at in range(0, len(second), size)]
    frames = [
        *attempt(1, [Piece(text=text) for text in first], complete=False),
        *attempt(2, pieces, complete=True),
    ]
    shown, said, changed = "".join(first), "", False
    try:
        for item in steady(frames):
            if isinstance(item, Piece):
                said += item.text
    except AnswerChanged:
        changed = True
    assert changed is (not second.startswith(shown))
    assert said == (shown if changed else second)


CALL = ToolCallDelta(index=0, id="call_1", name="reboot", arguments='{"host": "db-1"')


@pytest.mark.parametrize(
    "second",
    [
        Piece(tool_calls=(CALL.model_copy(update={"id": "call_2"}),)),
        Piece(tool_calls=(CALL.model_copy(update={"name": "shutdown"}),)),
        Piece(tool_calls=(CALL.model_copy(update={"arguments": '{"host": "db-2"'}),)),
        Piece(text="I will not."),
    ],
)
def test_a_call_that_changes(second: Piece) -> None:
    """Its id, its name, its arguments, or whether there is one at all: the first one stands, and an error follows."""
    frames = [*attempt(1, [Piece(tool_calls=(CALL,))], complete=False), *attempt(2, [second], complete=True)]
    said, items = Said(), steady(frames)
    said.add(cast("Piece", next(items)))
    with pytest.raises(AnswerChanged):
        list(items)
    text, calls, _ = said.facts()
    assert calls == [(0, 0, "call_1", "reboot")]
    assert text[0, 0] == CALL.arguments


def test_an_end_without_an_answer() -> None:
    """It follows whatever was said, of whichever attempt."""
    last = ended(2, "failed", "engine_failed")
    frames = [*attempt(1, [Piece(text="One "), Piece(text="two ")], complete=False), opening(2), last]
    assert list(steady(frames)) == [Piece(text="One "), Piece(text="two "), last]
