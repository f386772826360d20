"""The Prompt Assembly Engine: profile + directive + context → token ids.

The task's text is data. It is joined, never formatted, and encoded by a tokenizer that knows no control tokens, so
braces, template syntax, role markers and control tokens in it are only text.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from gateway_app.profiles import ActiveProfile
from tasks.errors import InvalidRequest, PromptTooLong
from tasks.job import Prompt, Sampling, TaskRequest

CONTEXT_HEADING = "\n\nContext:\n"
#: Control characters other than tab, line feed and carriage return.
_FORBIDDEN = frozenset(map(chr, (*range(9), 11, 12, *range(14, 32), 127)))


def assemble(task: TaskRequest, active: ActiveProfile, context_window: int) -> tuple[Prompt, Sampling]:
    """Return the task's prompt and its sampling with seed and token limit settled.

    `context_window` is in tokens. Raises PromptTooLong if prompt and answer do not fit it, InvalidRequest if the text
    holds control characters.
    """
    dynamic = active.layout.dynamic_token_ids(user_text(task))
    tokens = len(active.layout.static_token_ids) + len(dynamic)
    room = context_window - tokens
    wanted = task.sampling.max_tokens
    if "max_tokens" not in task.sampling.model_fields_set:
        wanted = min(wanted, room)
    if wanted < 1 or wanted > room:
        raise PromptTooLong(
            f"the prompt has {tokens} tokens and the answer may take {task.sampling.max_tokens}; "
            f"the model's context window is {context_window} tokens",
            prompt_tokens=tokens,
            context_window=context_window,
        )
    seed = task.sampling.seed if task.sampling.seed is not None else secrets.randbits(63)
    sampling = task.sampling.model_copy(update={"max_tokens": wanted, "seed": seed})
    return Prompt(active.static_profile_hash, tuple(dynamic), tokens), sampling


def user_text(task: TaskRequest) -> str:
    """Return the text of the user's turn: the directive, then the context under its heading."""
    for name, text in (("directive", task.directive), ("context", task.context)):
        if isinstance(text, str) and not _FORBIDDEN.isdisjoint(text):
            raise InvalidRequest(
                f"{name} holds control characters",
                errors=[
                    {"field": name, "message": "only tab, line feed and carriage return are allowed (strip ANSI codes)"}
                ],
            )
    if task.context is None or task.context == "":
        return task.directive
    return task.directive + CONTEXT_HEADING + _as_text(task.context)


def _as_text(context: str | dict[str, Any] | list[Any]) -> str:
    return context if isinstance(context, str) else json.dumps(context, ensure_ascii=False, indent=1)
