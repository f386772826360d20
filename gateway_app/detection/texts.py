"""Which texts of a request are scanned: all that the caller wrote and the model will read.

That is the content of every message (a task's directive and context among them, the context as the JSON that the model
is shown, so that names of keys are seen too), the names and arguments of earlier calls, the answers of tools, the
definitions of tools and the schema that an answer must fit. An agent's profile is its author's, and metadata goes to no
model: neither is scanned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tasks.job import TaskRequest


def texts_of(task: TaskRequest) -> Iterator[str]:
    """Give the texts of `task`, each whole, in the order of its messages."""
    for message in task.messages:
        yield message.get("content") or ""
        if "name" in message:
            yield message["name"]
        for call in message.get("tool_calls") or ():
            yield f"{call['function']['name']}: {call['function']['arguments']}"
    definitions = [*task.tools.tools] if task.tools else []
    if task.sampling.response_format is not None and task.sampling.response_format.json_schema is not None:
        definitions.append(task.sampling.response_format.json_schema)
    for definition in definitions:
        yield json.dumps(definition, ensure_ascii=False)
