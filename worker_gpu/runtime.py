"""The worker's asyncio side: one permanent thread whose loop runs the engine and every request on it.

The thread lives as long as the process, which the engine's orphan guard relies on: the kernel ends the engine's own
process when the thread that started it ends. Beside the requests a few small tasks run for ever: sending frames, hearing
of cancels, the heartbeat, and watching the engine. Leases are not renewed here: they have a thread of their own, so that
a loop that is kept busy loses none.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tasks import tracing
from tasks.errors import EngineDead
from tasks.logs import get_logger
from tasks.queueing.keys import QueueKeys
from tasks.settings import Settings
from worker_gpu.background import cancel, through_outages
from worker_gpu.delivery import Delivery
from worker_gpu.metrics import watch
from worker_gpu.parts import make_parts
from worker_gpu.progress import Progress
from worker_gpu.pulling import Pulling
from worker_gpu.refresher import Refresher
from worker_gpu.scopes import Outcome
from worker_gpu.shutdown import HAND_BACK_S, Shutdown
from worker_gpu.warmer import Warmer
from worker_gpu.watchdog import Watchdog

logger = get_logger(__name__)

#: Threads for what blocks; they are made as they are needed.
_THREADS = 32
GC_THRESHOLD = (50_000, 20, 50)
Done = Callable[[Outcome, float], None]


class Runtime:
    """Runs requests on an engine.

    `on_dead` is called once, if the engine dies, when everything was given back; `on_overdue` if after that, or after a
    drain, the loop is not stopped in time. Both are called from the loop's thread.
    """

    def __init__(
        self, settings: Settings, worker: str, on_dead: Callable[[], None], on_overdue: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._worker = worker
        self._on_dead = on_dead
        self._on_overdue = on_overdue
        self._running: set[asyncio.Task[Outcome]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-loop", daemon=True)

    def start(self) -> None:
        """Load the model and begin to run. Raises GatewayError if the engine does not start."""
        self._stop_tracing = tracing.start(self._settings.tracing, "metaqore-worker")
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    @property
    def in_hand(self) -> int:
        """Return how many messages were submitted and are not done."""
        return self._parts.admission.in_hand

    @property
    def pulling(self) -> Pulling:
        """Return what says what to ask the queue for."""
        return self._parts.pulling

    def announce(self) -> None:
        """Say in the heartbeat, at once, that messages are taken."""
        self._loop.call_soon_threadsafe(self._heart.become, "ready")

    def submit(self, delivery: Delivery, done: Done) -> None:
        """Hold a message's lease and run its job; `done(outcome, seconds)` is called from the loop's thread at the end."""
        self._leases.hold(delivery.tag, delivery.record)
        parts = self._parts
        progress = Progress(delivery, parts.admission, parts.cache, parts.engine.limits, parts.pulling.has_room)
        self._loop.call_soon_threadsafe(self._begin, delivery, progress, done)

    def refuse(self, tag: str, record: bytes, why: str) -> None:
        """Set aside a message that is none. `why` says so in a few words, without its content."""
        self._leases.hold(tag, record)
        self._leases.refuse(tag, why)

    def revoke(self, request_ids: list[str]) -> None:
        """Cancel requests, wherever they are. Returns at once."""
        asyncio.run_coroutine_threadsafe(self._parts.cancels.revoke(request_ids), self._loop)

    def drain(self, *, hurry: bool = False) -> None:
        """Begin nothing from now on, and let go of what runs when the grace time is over, or at once.

        Returns at once. May be called from a signal handler, and again.
        """
        self._loop.call_soon_threadsafe(self._shutdown.drain, hurry)

    def stop(self) -> None:
        """Drain, then end the engine: takes up to the grace time and a few seconds."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._unwatch()
        self._parts.close()
        self._stop_tracing()

    async def _start(self) -> None:
        self._parts = parts = make_parts(self._settings, self._worker, self._lost, lambda: len(self._running))
        self._unwatch = watch(parts, self._settings, lambda: self.in_hand)
        self._heart, self._leases, self._scopes = parts.heart, parts.leases, parts.runner.scopes
        # Each request waits in a thread while governance looks at it again, and perhaps at its project elsewhere.
        self._loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="worker"))
        self._background = [asyncio.create_task(through_outages(parts.heart.beat_for_ever))]
        started = time.monotonic()
        await parts.engine.start()
        # What there is by now stays. Looking through all of it for garbage, again and again, would cost a third of the time
        # of a busy loop.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        logger.info("engine ready", seconds=round(time.monotonic() - started, 1), limits=str(parts.engine.limits))
        parts.leases.start()
        prefix = self._settings.gateway.key_prefix
        warmer = Warmer(parts, QueueKeys(prefix), parts.pulling.wish, parts.pulling.has_room)
        reporting = asyncio.create_task(through_outages(parts.reporter.report_for_ever))
        self._shutdown = Shutdown(
            parts, self._running, reporting, self._settings.scheduling.drain_s, self._on_dead, self._on_overdue
        )
        self._background += [
            reporting,
            asyncio.create_task(parts.streams.send_forever()),
            asyncio.create_task(through_outages(parts.cancels.hear)),
            asyncio.create_task(parts.cancels.look()),
            asyncio.create_task(through_outages(lambda: parts.runner.hits.tell_for_ever(parts.redis, prefix))),
            asyncio.create_task(through_outages(warmer.warm_for_ever)),
            asyncio.create_task(Refresher(parts, parts.pulling.has_room).refresh_for_ever()),
            asyncio.create_task(self._watch_engine()),
        ]
        for task in self._background:
            task.add_done_callback(self._background_ended)

    def _begin(self, delivery: Delivery, progress: Progress, done: Done) -> None:
        started = time.monotonic()
        if self._shutdown.has_begun:
            self._leases.give_back(delivery.tag)
            progress.end()
            done("queued", 0.0)
            return
        task = self._loop.create_task(self._run(delivery, progress))
        self._running.add(task)

        def ended(finished: asyncio.Task[Outcome]) -> None:
            self._running.discard(finished)
            progress.end()
            done("queued" if finished.cancelled() else finished.result(), time.monotonic() - started)

        task.add_done_callback(ended)

    async def _run(self, delivery: Delivery, progress: Progress) -> Outcome:
        try:
            return await self._parts.runner.run(delivery, progress)
        except EngineDead as error:
            self._shutdown.die(error.detail)
        except Exception as error:
            # Nobody runs it any more, so its lease must end, and another worker tries.
            logger.error("unexpected error with a message", tag=delivery.tag, error=type(error).__name__)
            self._leases.release(delivery.tag)
        return "queued"

    def _lost(self, tag: str) -> None:
        """Hear from the leases' thread that a message is another's."""
        self._loop.call_soon_threadsafe(self._scopes.lose, tag)

    async def _stop(self) -> None:
        self._shutdown.drain(hurry=False)
        await self._shutdown.wait()
        await cancel([*self._running, *self._background])
        # Only now: until Celery's consumer was stopped, messages could come, to be given back.
        await asyncio.to_thread(self._leases.close, HAND_BACK_S)
        await self._parts.engine.stop()
        await self._heart.stop()
        await self._parts.redis.aclose()

    async def _watch_engine(self) -> None:
        try:
            engine = self._parts.engine
            await Watchdog(engine, self._settings.engine.stall_s or engine.stall_s).watch()
        except EngineDead as error:
            self._shutdown.die(error.detail)

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        # Without one of them requests would run and never end, so the worker had better be replaced.
        if not task.cancelled() and (error := task.exception()) is not None:
            self._shutdown.die(f"a background task of the worker failed with {type(error).__name__}")
