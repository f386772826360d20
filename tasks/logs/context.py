"""Which request a thread or an asyncio task is at work on, for every line that is logged meanwhile.

A context variable: each thread has its own, each asyncio task its own copy, which `asyncio.to_thread` hands on. A thread that
serves one request after another binds each anew, or None.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

_request_id: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)
#: Binds the request that this thread or task works on from now on; None for no request.
bind_request: Final = _request_id.set
#: Returns the id of the request that this thread or task works on, or None.
bound_request: Final = _request_id.get
