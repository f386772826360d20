"""How we know that vLLM still computes.

EngineCore is a process of its own: it may hang, in a kernel or a driver, with its socket open and its process alive. vLLM's
own check of its health sees nothing of that. But it reports figures with every step, also with those that only compute
a part of a long prompt or wait for a grammar; counting these reports tells a slow engine from one that hangs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

#: A step on plain processors may compute a prompt of thousands of tokens, at a few hundred a second.
CPU_STALL_S = 120.0


class StepCounter:
    """What vLLM takes for a logger of its figures; it counts how often there are some, and which requests wait for them."""

    def __init__(self) -> None:
        self.steps = 0
        self.requests = 0

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Count a request as EngineCore's until the end of the block."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def record(self, *_figures: Any, **_more: Any) -> None:
        """Count a step."""
        self.steps += 1

    def log_engine_initialized(self) -> None:
        """Have nothing to say of the start."""

    def log(self) -> None:
        """Have nothing to say from time to time."""
