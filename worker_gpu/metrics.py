"""What a worker tells of itself when somebody asks. Names and meanings are in `tasks.metrics.worker`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from prometheus_client.core import Metric

from tasks.metrics import worker as metrics
from tasks.metrics.making import told_by
from tasks.metrics.own import Own
from tasks.metrics.serving import serve
from tasks.prompts.radix import Tier
from tasks.settings import Settings
from worker_gpu.heart import State
from worker_gpu.parts import Parts

#: A loop that is busy turns many times a second.
_LOOP_S = 10.0


class WorkerReadings:
    """Looks up what a worker does; `in_hand` tells how many requests it has taken and not let go."""

    def __init__(self, parts: Parts, room: int, in_hand: Callable[[], int]) -> None:
        self._parts, self._room, self._in_hand = parts, room, in_hand

    def describe(self) -> Iterable[Metric]:
        """Have nothing looked up before somebody asks."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Look everything up: nothing of it waits for anybody."""
        engine, leases = self._parts.engine, self._parts.leases
        load = engine.load
        yield metrics.ENGINE_SEQUENCES.by({("running",): load.running, ("waiting",): load.waiting})
        yield metrics.ENGINE_LIMIT.now(self._room)
        if load.kv_usage is not None:
            yield metrics.ENGINE_KV.now(load.kv_usage)
        blocks = self._parts.cache.blocks
        yield metrics.KV_BLOCKS.by({(tier.name.lower(),): blocks.count(tier) for tier in Tier})
        yield metrics.KV_LOSSES.now(blocks.losses)
        yield metrics.ENGINE_STEPS.now(engine.steps)
        yield metrics.ENGINE_PREEMPTIONS.now(load.preemptions)
        state = self._parts.heart.state
        yield metrics.WORKER_STATE.by({(each,): each == state for each in get_args(State)})
        yield metrics.IN_HAND.now(self._in_hand())
        yield metrics.LEASES_HELD.now(len(leases.held))
        yield metrics.LEASES_CONFIRMED.now(leases.renewal_age_s)


def watch(parts: Parts, settings: Settings, in_hand: Callable[[], int]) -> Callable[[], None]:
    """Serve the worker's metrics where the settings say; return what ends it. To be called on the engine's loop."""
    readings = WorkerReadings(parts, settings.engine.max_num_seqs, in_hand)
    registry = told_by("worker", Own("worker", parts.database), readings)
    loop = asyncio.get_running_loop()
    return serve(registry, settings.metrics.host, settings.metrics.worker_port, lambda: _wrong(parts, loop))


def _wrong(parts: Parts, loop: asyncio.AbstractEventLoop) -> str | None:
    """Return why the worker is of no use. That its engine does not step, it notices itself, and ends (see `watchdog`)."""
    if parts.heart.state == "loading":
        return "the model is being loaded"
    if parts.heart.state == "dead":
        return "the engine is of no use any more"
    turned = threading.Event()
    try:
        loop.call_soon_threadsafe(turned.set)
    except RuntimeError:
        return "the worker has ended"
    return None if turned.wait(_LOOP_S) else f"the engine's loop has not turned for {_LOOP_S:.0f} s"
