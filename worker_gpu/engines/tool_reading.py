"""What one choice says, told apart into text and calls of tools.

A `Source` takes the text as it comes and gives back what of it is text and what belongs to calls: there is one for each
way in which a model can be made to write calls (json_calls.py, vllm_tools.py). `ToolReader` puts a source's findings
into the shape that clients rely on: calls are numbered from 0 without gaps, a call's first part has its id and name
and no other does, arguments are one JSON object, and `finish_reason` is "tool_calls" where the model stopped after a call. An answer that was cut
off at `max_tokens` keeps "length", since its last call may be half a call.

Ids are hashes of the request and the call's place in the answer, not random: an attempt that is begun again on another
worker then repeats what its reader has already seen.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.job import FinishReason, ToolCallDelta
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.json_text import JsonText

#: Templates of Mistral's models refuse ids of another length.
MISTRAL_ID_CHARACTERS = 9
ID_CHARACTERS = 24


@dataclass(frozen=True, slots=True)
class CallPart:
    """Part of a call as a source found it: `index` tells calls apart and may be any number."""

    index: int
    name: str | None = None
    arguments: str = ""


class Source(Protocol):
    """Tells one choice's text from its calls. It has the state of that choice."""

    def read(
        self, text: str, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, Sequence[CallPart]]:
        """Take what came since the last call; return what is known to be text, and parts of calls.

        With a finish reason nothing more comes, and what was held back is given.
        """
        ...


class ToolReader:
    """Reads one choice. `call_id` gives the id of the call with a number; with `single`, later calls are dropped."""

    def __init__(self, source: Source, call_id: Callable[[int], str], *, single: bool) -> None:
        """Take where the calls come from; nothing is read yet."""
        self._source = source
        self._call_id = call_id
        self._single = single
        self._numbers: dict[int, int] = {}
        self._named: set[int] = set()
        self._arguments: dict[int, JsonText] = defaultdict(lambda: JsonText(one_object=True))

    def read(
        self, text: str, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, tuple[ToolCallDelta, ...], FinishReason | None]:
        """Return the text, the parts of calls and the finish reason to be shown."""
        said, parts = self._source.read(text, token_ids, finish_reason)
        deltas = tuple(delta for part in parts if (delta := self._delta(part)) is not None)
        if finish_reason == "stop" and self._numbers:
            finish_reason = "tool_calls"
        return said, deltas, finish_reason

    def _delta(self, part: CallPart) -> ToolCallDelta | None:
        first = part.index not in self._numbers
        number = self._numbers.setdefault(part.index, len(self._numbers))
        if self._single and number > 0:
            return None
        name = None if number in self._named else part.name
        if name is not None:
            self._named.add(number)
        if not first and name is None and not part.arguments:
            return None
        return ToolCallDelta(
            index=number,
            id=self._call_id(number) if first else None,
            name=name,
            arguments=self._arguments[number].read(part.arguments),
        )


def call_ids(request: GenerationRequest, choice: int, *, mistral: bool) -> Callable[[int], str]:
    """Return what gives the ids of a choice's calls. Without a seed each attempt is another answer, with other ids."""
    digest = hashlib.sha256(array("q", request.prompt_token_ids).tobytes())
    digest.update(repr((request.cache_salt, request.sampling, choice)).encode())
    if request.sampling.seed is None:
        digest.update(request.request_id.encode())

    def call_id(number: int) -> str:
        own = digest.copy()
        own.update(number.to_bytes(4))
        name = own.hexdigest()
        return name[:MISTRAL_ID_CHARACTERS] if mistral else f"call_{name[:ID_CHARACTERS]}"

    return call_id
