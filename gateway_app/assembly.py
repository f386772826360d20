"""The Prompt Assembly Engine: profile + messages + tools → token ids.

The request's text is data. It is given to the model's own chat template, never formatted, and encoded by a tokenizer
that knows no control tokens, so braces, template syntax, role markers and control tokens in it are only text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from gateway_app.profiles import ActiveProfile
from tasks.errors import InvalidRequest, PromptTooLong, Unsupported
from tasks.job import Prompt, Sampling, TaskRequest


def assemble(
    task: TaskRequest, active: ActiveProfile | None, cold: Callable[[], ActiveProfile], context_window: int
) -> tuple[Prompt, Sampling]:
    """Return the request's prompt and its sampling with seed and token limit settled.

    `active` is the agent's profile, if it names one. A prompt that does not begin with it is queued as `cold`, which
    has no static part. `context_window` is in tokens. Raises PromptTooLong if prompt and answer do not fit it,
    Unsupported if the model's template cannot show tools, TemplateRefused if it refuses the messages.
    """
    layout = (active or cold()).layout
    tools = list(task.tools.tools) if task.tools else None
    if tools and not layout.supports_tools:
        raise Unsupported(
            "the model's chat template does not show tools to the model",
            param="tools",
            hint="Serve a model made for tools.",
        )
    joined, ids = layout.encode([as_rendered(message) for message in task.messages], tools)
    # Tools may change where a prompt begins; a profile without a static part has nothing that could be changed.
    static = active if active is not None and (joined or not layout.static_token_ids) else cold()
    tokens = len(static.layout.static_token_ids) + len(ids)
    room = context_window - tokens
    wanted = task.sampling.max_tokens
    if "max_tokens" not in task.sampling.model_fields_set:
        # OpenAI's API sets no limit but the context window.
        wanted = min(wanted, room) if task.api == "tasks" else room
    if wanted < 1 or wanted > room:
        raise PromptTooLong(
            f"the prompt has {tokens} tokens and the answer may take {max(wanted, 1)}; "
            f"the model's context window is {context_window} tokens",
            prompt_tokens=tokens,
            context_window=context_window,
        )
    seed = task.sampling.seed if task.sampling.seed is not None else secrets.randbits(63)
    sampling = task.sampling.model_copy(update={"max_tokens": wanted, "seed": seed})
    return Prompt(static.static_profile_hash, tuple(ids), tokens, static.chain), sampling


def as_rendered(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message as chat templates expect it: with its calls' arguments as an object, not as JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_parsed_arguments(call) for call in calls]}


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        raise InvalidRequest(
            "the arguments of a tool call are not JSON",
            errors=[{"field": "messages.tool_calls.function.arguments", "message": "must be JSON text"}],
        ) from None
    return {**call, "function": {**function, "arguments": arguments}}
