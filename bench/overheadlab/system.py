"""What is compared: something that answers chat completions over HTTP, and the processes that are it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

#: Of a plain answer and of a stream, in tokens. The model says one word a token.
ANSWER_TOKENS = 20
PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class System:
    """A system that runs. `parts` are the processes it began with, by what they do; their descendants belong to them.

    `model`, `headers` and `system_prompt` are how it is asked: the prompt is empty where the system itself knows it.
    `answer` is what it has to say each time; where that depends on the question it is empty.
    """

    name: str
    port: int
    model: str
    parts: Mapping[str, Sequence[psutil.Process]]
    headers: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str = ""
    answer: str = ""

    def body(self, question: str, *, stream: bool, tokens: int = ANSWER_TOKENS) -> dict[str, Any]:
        """Return the body of a request for an answer of so many tokens."""
        prompt = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        body = {
            "model": self.model,
            "messages": [*prompt, {"role": "user", "content": question}],
            "max_tokens": tokens,
        }
        return {**body, "stream": True} if stream else body
