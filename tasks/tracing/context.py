"""A trace's context as text: what one process hands to the next, so that the same trace goes on there.

It is W3C's `traceparent`, and after a space `tracestate` where there is one. It travels in the queue message and is kept
in SQL with the request. `tracestate` is text of whoever called us: it is bounded, passed on and never logged.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What W3C asks everybody to pass on, in characters. A longer tracestate is left out; the trace goes on without it.
TRACESTATE_MAX = 512
#: Version, trace id, span id and flags: 2 + 32 + 16 + 2 digits with hyphens between.
TRACEPARENT_LENGTH = 55
#: The longest text that `pack` makes, in characters.
CONTEXT_MAX = TRACEPARENT_LENGTH + 1 + TRACESTATE_MAX


def pack(traceparent: str | None, tracestate: str | None) -> str | None:
    """Return both as one text, or None if the first is missing or has another length. Nothing else is checked here."""
    if traceparent is None or len(traceparent) != TRACEPARENT_LENGTH:
        return None
    return f"{traceparent} {tracestate}" if tracestate and len(tracestate) <= TRACESTATE_MAX else traceparent


def unpack(context: str) -> Mapping[str, str]:
    """Return the header fields that `pack` took."""
    traceparent, _, tracestate = context.partition(" ")
    return {"traceparent": traceparent, "tracestate": tracestate} if tracestate else {"traceparent": traceparent}
