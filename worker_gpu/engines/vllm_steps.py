"""How we know that vLLM still computes.

EngineCore is a process of its own: it may hang, in a kernel or a driver, with its socket open and its process alive. vLLM's
own check of its health sees nothing of that. But it reports figures with every step, also with those that only compute
a part of a long prompt or wait for a grammar; counting these reports tells a slow engine from one that hangs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from worker_gpu.engines.base import EngineLoad
from worker_gpu.engines.tier_rates import MeasuredRates

#: A step on plain processors may compute a prompt of thousands of tokens, at a few hundred a second.
CPU_STALL_S = 120.0


class StepCounter:
    """What vLLM takes for a logger of its figures; it counts how often there are some, and which requests wait for them."""

    def __init__(self, tiers: MeasuredRates) -> None:
        """Take what wants to know how fast blocks come back from slower tiers."""
        self.steps = 0
        self.requests = 0
        self.load = EngineLoad()
        self._tiers = tiers

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Count a request as EngineCore's until the end of the block."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_figures: Any, **_more: Any) -> None:
        """Count a step, and keep what it says of the scheduler. Not every report has both parts."""
        self.steps += 1
        preemptions = self.load.preemptions + (iteration_stats.num_preempted_reqs if iteration_stats is not None else 0)
        if scheduler_stats is not None:
            running, waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self.load = EngineLoad(running, waiting, scheduler_stats.kv_cache_usage, preemptions)
            if (external := scheduler_stats.connector_prefix_cache_stats) is not None:
                self._tiers.add(external.hits_by_source, scheduler_stats.kv_connector_stats)
        elif preemptions != self.load.preemptions:
            self.load = replace(self.load, preemptions=preemptions)

    def log_engine_initialized(self) -> None:
        """Have nothing to say of the start."""

    def log(self) -> None:
        """Have nothing to say from time to time."""
