"""What validators demand of a request and types cannot say, as JSON Schema.

Each entry stands beside what pydantic writes of the model of that name. Fuzzing tells when one is missing or wrong:
requests made from the document must be accepted, and those that break it refused.
"""

from __future__ import annotations

from typing import Any

from gateway_app.openai.governance import IN_METADATA
from gateway_app.profiles.drafts import RESERVED_NAMES
from tasks.ids import PATTERN

#: Text without control characters other than tab, line feed and carriage return; the second kind is not blank either.
_PRINTABLE = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"
_NOT_BLANK = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*[^\s\x00-\x1f\x7f\x85][^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"

_METADATA = (
    f"The caller's own notes, returned with the request. Governance reads {', '.join(IN_METADATA)} here, where no header "
    "says the same."
)
_STOP = {"type": "string", "minLength": 1, "maxLength": 256}
_NONE = {"type": "null"}
_NO_CALLS = {"anyOf": [_NONE, {"type": "array", "maxItems": 0}]}
_CALLS = {"type": "array", "minItems": 1}
_CONTENT = {"type": ["string", "array"]}


def _requires(given: str, value: dict[str, Any], **wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the rule that where the field `given` is `value`, others are there and as `wanted`."""
    return {
        "if": {"properties": {given: value}, "required": [given]},
        "then": {"properties": wanted, "required": list(wanted)},
    }


_TRUE = {"const": True}

#: Of a whole model, by its name.
OF_MODELS: dict[str, dict[str, Any]] = {
    "Message": {
        "anyOf": [
            {
                "properties": {"role": {"enum": ["system", "developer", "user"]}, "content": _CONTENT}
                | {"tool_calls": _NO_CALLS},
                "required": ["content"],
            },
            {"properties": {"role": {"const": "assistant"}, "content": _CONTENT}, "required": ["content"]},
            {"properties": {"role": {"const": "assistant"}, "tool_calls": _CALLS}, "required": ["tool_calls"]},
            {
                "properties": {"role": {"const": "tool"}, "content": _CONTENT, "tool_calls": _NO_CALLS}
                | {"tool_call_id": {"type": "string", "minLength": 1}},
                "required": ["content", "tool_call_id"],
            },
        ]
    },
    "AnswerFormat": _requires("type", {"const": "json_schema"}, json_schema={"type": "object"}),
    "ChatBody": {
        "allOf": [
            _requires("stream_options", {"type": "object"}, stream=_TRUE),
            _requires("top_logprobs", {"type": "integer", "minimum": 1}, logprobs=_TRUE),
        ]
    },
}
#: Of one field, by its model's name and its own.
OF_FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    ("TaskBody", "directive"): {"pattern": _NOT_BLANK},
    ("TaskBody", "context"): {"pattern": _PRINTABLE},
    ("NewAgent", "agent"): {"not": {"enum": list(RESERVED_NAMES)}},
    ("ProfileFile", "agent"): {"not": {"enum": list(RESERVED_NAMES)}},
    ("NewAgent", "description"): {"pattern": _PRINTABLE},
    ("NewVersion", "description"): {"pattern": _PRINTABLE},
    ("ProfileFile", "description"): {"pattern": _PRINTABLE},
    ("Segment", "text"): {"pattern": _NOT_BLANK},
    ("Example", "user"): {"pattern": _NOT_BLANK},
    ("Example", "assistant"): {"pattern": _NOT_BLANK},
    ("TaskQuery", "after"): {"pattern": f"^{PATTERN}$"},
    ("ChatBody", "stop"): {"anyOf": [_STOP, {"type": "array", "maxItems": 4, "items": _STOP}, _NONE]},
    ("ChatBody", "metadata"): {"description": _METADATA},
    ("ResponseBody", "metadata"): {"description": _METADATA},
    ("ResponseBody", "input"): {"minItems": 1},
    ("CalledFunction", "arguments"): {"contentMediaType": "application/json"},
}
