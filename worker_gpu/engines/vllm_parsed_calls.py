"""What one choice says, as vLLM's parser for the model reads it.

A model may write anything, and parsers are written for what it should write. So nothing they do ends a request:

- A parser that raises is not asked again, and what it had not yet given is text.
- What a parser has read of a call's arguments and not passed on, as some do at the end, is compared with what was
  passed on, and the rest is added.
- If it held text back and no call came of it, it is asked once more with the whole answer, since some find calls only
  so; if there are none, what was held back is text after all. Parsers that are built on vLLM's newer parser engine are
  left out: they drop half a call on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tasks.job import FinishReason
from tasks.logs import get_logger
from worker_gpu.engines.tool_reading import CallPart

logger = get_logger(__name__)


class ParsedCalls:
    """A source of text and calls that asks vLLM's parser; see Source."""

    def __init__(self, parser: Any, request: Any, prompt_token_ids: list[int]) -> None:
        """Take a parser that nobody else uses."""
        self._parser = parser
        self._request = request
        self._prompt_token_ids = prompt_token_ids
        self._failed = False
        self._heard = ""  # All that the model said.
        self._told = ""  # What of it was given as text.
        self._arguments: dict[int, str] = {}  # What was given of each call.

    def read(
        self, text: str, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, Sequence[CallPart]]:
        """See Source.read."""
        said, parts = "", list[CallPart]()
        tokens = self._tokens(text, list(token_ids))
        for number, (piece, ids) in enumerate(tokens, start=1):
            last = number == len(tokens) and finish_reason is not None
            if self._failed:
                said += piece
                continue
            self._heard += piece
            told = self._told
            try:
                said += self._parse(piece, ids, parts, finish_reason if last else None)
            except Exception as error:
                # Whatever it was: the model has said something that its parser was not written for.
                self._failed, self._told = True, told
                logger.warning("a tool parser failed; the rest of the answer is text", error=type(error).__name__)
                said += piece if self._arguments else self._held_back() or piece
        return said, parts

    def _tokens(self, text: str, token_ids: list[int]) -> list[tuple[str, list[int]]]:
        """Return what came, token by token, where the text can be told apart so.

        Several tokens come together when this process is late, and parsers are made for one at a time: some lose a
        call that begins and ends in one piece.
        """
        if len(token_ids) < 2:  # noqa: PLR2004 - there is nothing to tell apart.
            return [(text, token_ids)]
        decode, skip = self._parser.model_tokenizer.decode, self._request.skip_special_tokens
        try:
            pieces = [decode([token], skip_special_tokens=skip) for token in token_ids]
        except Exception:
            # Tokenizers are many, and this one cannot tell.
            return [(text, token_ids)]
        if "".join(pieces[:-1]) == text:
            pieces[-1] = ""  # The token that ended the answer is no part of its text.
        if "".join(pieces) != text:
            return [(text, token_ids)]
        return [(piece, [token]) for piece, token in zip(pieces, token_ids, strict=True)]

    def _parse(self, text: str, token_ids: list[int], parts: list[CallPart], finish_reason: FinishReason | None) -> str:
        """Return what is text, and add to `parts` what is of calls."""
        finished = finish_reason is not None
        message = self._parser.parse_delta(
            text, token_ids, self._request, prompt_token_ids=self._prompt_token_ids, finished=finished
        )
        said, found = _content(message)
        self._told += said
        for part in found:
            self._arguments[part.index] = self._arguments.get(part.index, "") + part.arguments
        parts += found
        if finish_reason is None:
            return said
        if self._arguments or getattr(self._parser.tool_parser, "engine_based_streaming", False):
            parts += self._unstreamed(finish_reason)
            return said
        return said + self._at_once(parts)

    def _at_once(self, parts: list[CallPart]) -> str:
        """Look for calls in the whole answer, which gave none in pieces; return what of it is text, and was not given."""
        if not (rest := self._held_back()):
            return ""
        found = self._parser.tool_parser.extract_tool_calls(self._heard, request=self._request)
        calls = found.tool_calls if found.tools_called else ()
        parts += [CallPart(at, call.function.name, call.function.arguments) for at, call in enumerate(calls)]
        if not calls:
            return rest
        content = found.content or ""
        return content[len(self._told) :] if content.startswith(self._told) else ""

    def _held_back(self) -> str:
        """Return what was neither given as text nor has become a call."""
        return self._heard[len(self._told) :] if self._heard.startswith(self._told) else ""

    def _unstreamed(self, finish_reason: FinishReason) -> list[CallPart]:
        """Return what the parser has read of arguments and not passed on. A whole call without any has none: {}."""
        parsed = getattr(self._parser.tool_parser, "prev_tool_call_arr", [])
        missing: list[CallPart] = []
        for index, given in self._arguments.items():
            arguments = parsed[index].get("arguments") if index < len(parsed) else None
            if not given and not arguments and finish_reason == "stop":
                arguments = {}
            if arguments is None:
                continue
            whole = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            if whole.startswith(given) and whole != given:
                missing.append(CallPart(index, arguments=whole[len(given) :]))
        return missing


def _content(message: Any) -> tuple[str, list[CallPart]]:
    """Return the text and the parts of calls in vLLM's DeltaMessage, or nothing where there is none."""
    if message is None:
        return "", []
    parts = [
        CallPart(call.index, getattr(call.function, "name", None), getattr(call.function, "arguments", None) or "")
        for call in message.tool_calls or ()
    ]
    return message.content or "", parts
