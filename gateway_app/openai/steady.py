"""A stream that never takes back what it said, for clients that know no reset.

When a worker is lost, another begins the answer again. With the seed fixed it usually says the same, so what was
already sent is compared and left out; if it comes out differently, the stream ends with an error that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tasks.errors import AnswerChanged
from tasks.job import Piece, ToolCallDelta
from tasks.stream import Frame

_Key = tuple[int, int | None]


class _Said:
    """What one attempt said, by choice and tool call (None is the text), and how many log probabilities came.

    `calls` are the id and name of each call.
    """

    def __init__(self) -> None:
        self.text: dict[_Key, str] = {}
        self.calls: dict[_Key, tuple[str | None, str]] = {}
        self.logprobs: dict[int, int] = {}


def steady(frames: Iterable[Frame | None]) -> Iterator[Piece | Frame | None]:
    """Yield what is new as pieces, the terminal frame as it is, and None for silence. Raises AnswerChanged."""
    sent, said = _Said(), _Said()
    for frame in frames:
        if frame is None or frame.terminal:
            if frame is not None and frame.event == "completed" and said.text != sent.text:
                # The new answer is shorter, or lacks a call.
                raise AnswerChanged
            yield frame
        elif frame.event == "reset":
            said = _Said()
        elif frame.event == "delta":
            piece = _unsent(Piece.model_validate(frame.data, strict=False), sent, said)
            if piece is not None:
                yield piece


def _unsent(piece: Piece, sent: _Said, said: _Said) -> Piece | None:
    """Return what of `piece` has not been sent, and note it."""
    text = _new(piece.text, (piece.choice, None), sent, said)
    calls = []
    for call in piece.tool_calls:
        key = (piece.choice, call.index)
        known = key in sent.text
        if call.name is not None and sent.calls.setdefault(key, (call.id, call.name)) != (call.id, call.name):
            raise AnswerChanged
        arguments = _new(call.arguments, key, sent, said)
        if not known:
            calls.append(call)
        elif arguments:
            calls.append(ToolCallDelta(index=call.index, arguments=arguments))
    have, got = sent.logprobs.get(piece.choice, 0), said.logprobs.get(piece.choice, 0)
    logprobs = piece.logprobs[max(0, have - got) :]
    said.logprobs[piece.choice] = got + len(piece.logprobs)
    sent.logprobs[piece.choice] = max(have, said.logprobs[piece.choice])
    if not (text or calls or logprobs):
        return None
    return Piece(text=text, choice=piece.choice, tool_calls=tuple(calls), logprobs=logprobs)


def _new(text: str, key: _Key, sent: _Said, said: _Said) -> str:
    before = said.text.get(key, "")
    said.text[key] = now = before + text
    already = sent.text.get(key, "")
    if not (already.startswith(now) or now.startswith(already)):
        raise AnswerChanged
    if len(now) > len(already) or key not in sent.text:
        sent.text[key] = now
    return now[max(len(already), len(before)) :] if len(now) > len(already) else ""
