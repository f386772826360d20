"""JSON that a model writes, made readable.

In a string of JSON, control characters must be escaped. Models know that and still write a line break as it is, above
all in arguments that hold code; and the grammar of a string with `minLength` or `maxLength`, as xgrammar 0.2.8 makes
it, lets them. Such a character has no meaning in JSON, so to escape it can only make unreadable text readable.

Arguments of a call are one object. What follows its last brace is none of it: models add further keys to the call
where only its end belongs, and some of vLLM's parsers take them for arguments, or give the same arguments twice.
"""

from __future__ import annotations

import json
import re

MARKS = re.compile(r'["\\\x00-\x1f{}\[\]]')


class JsonText:
    """Reads one JSON text, which comes in pieces cut anywhere. With `one_object`, it ends with its first object."""

    def __init__(self, *, one_object: bool = False) -> None:
        """Begin outside of any string."""
        self._one_object = one_object
        self._in_string = False
        self._escaping = False
        self._depth = 0
        self._ended = False

    def read(self, text: str) -> str:
        """Return the next piece, readable."""
        taken: list[str] = []
        start = position = 0
        if self._escaping and text:
            self._escaping, position = False, 1
        while not self._ended and (found := MARKS.search(text, position)):
            mark, position = found.group(), found.end()
            if not self._in_string:
                self._step(mark)
            elif mark == '"':
                self._in_string = False
            elif mark == "\\":
                self._escaping = position == len(text)
                position += 1
            elif mark < " ":
                taken += [text[start : found.start()], json.dumps(mark)[1:-1]]
                start = position
            if self._ended:
                return "".join(taken) + text[start:position]
        if self._ended:
            return ""
        return "".join(taken) + text[start:] if taken else text

    def _step(self, mark: str) -> None:
        if mark == '"':
            self._in_string = True
        elif mark in "{[":
            self._depth += 1
        elif mark in "}]":
            self._depth -= 1
            self._ended = self._one_object and self._depth <= 0
