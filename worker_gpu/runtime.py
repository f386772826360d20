"""The worker's asyncio side: one permanent thread whose loop runs the engine and every request on it.

The thread lives as long as the process, which the engine's orphan guard relies on: the kernel ends the engine's own
process when the thread that started it ends. Beside the requests four small tasks run for ever: sending frames,
renewing leases, the heartbeat, and asking the engine for its health.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from redis.asyncio import Redis

from tasks import lifecycle
from tasks.crypto import KeyWrapper, Signer
from tasks.db import Database
from tasks.errors import DatabaseUnavailable, EngineDead
from tasks.governance.metaqore import make_projects
from tasks.governance.policies import default_policy
from tasks.governance.recheck import Recheck
from tasks.prompts.tokenizer import ModelTokenizer, resolve_checkpoint
from tasks.queueing.heartbeats import INTERVAL_S, TTL_S
from tasks.queueing.keys import QueueKeys
from tasks.queueing.leases import Leases
from tasks.queueing.message import MessageCodec
from tasks.settings import Settings
from worker_gpu.engines import create_engine
from worker_gpu.profiles import StaticParts
from worker_gpu.runner import Runner
from worker_gpu.streams import StreamWriter

logger = logging.getLogger(__name__)

DRAIN_S = 20.0
_LEASES_PER_RENEWAL = 3
#: Threads for what blocks; they are made as they are needed.
_THREADS = 32
_CANCEL_RETRY_S = 0.5
GC_THRESHOLD = (50_000, 20, 50)


class Runtime:
    """Runs requests on an engine. `on_dead` is called once, from the loop's thread, if the engine dies."""

    def __init__(self, settings: Settings, worker: str, on_dead: Callable[[], None]) -> None:
        self._settings = settings
        self._worker = worker
        self._on_dead = on_dead
        self._state = "loading"
        self._running: dict[str, asyncio.Task[bool]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-loop", daemon=True)

    def start(self) -> None:
        """Load the model and begin to run. Raises GatewayError if the engine does not start."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def announce(self) -> None:
        """Say in the heartbeat, at once, that messages are taken."""

        async def say() -> None:
            self._state = "ready"
            await self._beat()

        asyncio.run_coroutine_threadsafe(say(), self._loop)

    def submit(self, envelope: Any, tag: str, done: Callable[[bool, float], None]) -> None:
        """Run the job of a message; `done(succeeded, seconds)` is called from the loop's thread at the end."""
        self._loop.call_soon_threadsafe(self._begin, envelope, tag, done)

    def stop(self) -> None:
        """Wait up to 20 seconds for running requests, then end the engine. What is left stays leased."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._database.close()
        if self._projects is not None:
            self._projects.close()

    async def _start(self) -> None:
        settings = self._settings
        self._keys = QueueKeys(settings.gateway.key_prefix)
        self._redis = Redis.from_url(
            settings.gateway.request_queue_url,
            socket_timeout=settings.gateway.redis_timeout_s,
            socket_connect_timeout=3.0,
            socket_keepalive=True,
            health_check_interval=10,
        )
        self._leases = Leases(self._redis, self._keys)
        self._database = Database(settings.database)
        self._projects = make_projects(settings)
        # Each request waits in a thread while governance looks at it again, and perhaps at its project elsewhere.
        self._loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="worker"))
        self._streams = StreamWriter(self._redis, settings.gateway.key_prefix, settings.streaming)
        self._background = [asyncio.create_task(self._forever(self._beat, INTERVAL_S))]
        self._engine = create_engine(settings)
        wrapper = KeyWrapper(settings.secrets.keys("master_key"))
        checkpoint = resolve_checkpoint(settings.engine.model_source, settings.engine.revision)
        started = time.monotonic()
        await self._engine.start()
        # What there is by now stays. Looking through all of it for garbage, again and again, would cost a third of the time
        # of a busy loop.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        logger.info("engine ready after %.1f s: %s", time.monotonic() - started, self._engine.limits)
        self._runner = Runner(
            engine=self._engine,
            database=self._database,
            codec=MessageCodec(Signer(settings.secrets.keys("signing_key")), wrapper),
            static_parts=StaticParts(self._database, wrapper, ModelTokenizer(checkpoint).fingerprint),
            streams=self._streams,
            leases=self._leases,
            worker=self._worker,
            model=settings.engine.model_name,
            max_attempts=settings.scheduling.max_attempts,
            salt=settings.secrets.keys("organization_salt")[0],
            recheck=Recheck(self._database, default_policy(settings.governance), self._projects).refusal,
            patience_s=settings.metaqore.patience_s,
        )
        renewal_s = settings.scheduling.lease_s / _LEASES_PER_RENEWAL
        self._background += [
            asyncio.create_task(self._streams.send_forever()),
            asyncio.create_task(self._forever(self._hear_cancels, _CANCEL_RETRY_S)),
            asyncio.create_task(self._look_for_cancels()),
            asyncio.create_task(self._forever(lambda: self._leases.renew(tuple(self._running)), renewal_s)),
            asyncio.create_task(self._watch_engine()),
        ]
        for task in self._background:
            task.add_done_callback(self._background_ended)

    def _begin(self, envelope: Any, tag: str, done: Callable[[bool, float], None]) -> None:
        started = time.monotonic()
        task = self._loop.create_task(self._run(envelope, tag))
        self._running[tag] = task

        def ended(finished: asyncio.Task[bool]) -> None:
            if self._running.get(tag) is task:
                del self._running[tag]
            succeeded = not finished.cancelled() and finished.exception() is None and finished.result()
            done(succeeded, time.monotonic() - started)

        task.add_done_callback(ended)

    async def _run(self, envelope: Any, tag: str) -> bool:
        try:
            return await self._runner.run(envelope, tag)
        except EngineDead:
            self._die()
            return False

    async def _stop(self) -> None:
        self._state = "draining"
        if self._running:
            logger.info("waiting up to %.0f s for %d running requests", DRAIN_S, len(self._running))
            await asyncio.wait(self._running.values(), timeout=DRAIN_S)
        await _cancel([*self._running.values(), *self._background])
        await self._engine.stop()
        try:
            await self._redis.delete(self._keys.heartbeat(self._worker))
        except redis.RedisError:
            logger.warning("the heartbeat could not be removed; it ends by itself")
        await self._redis.aclose()

    async def _hear_cancels(self) -> None:
        """Stop what gateways say was cancelled, as long as the connection holds."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(self._keys.cancels)
            while True:
                message = await channel.get_message(timeout=INTERVAL_S)
                if message is not None:
                    self._runner.stop(message["data"].decode("ascii", "replace"))

    async def _look_for_cancels(self) -> None:
        """Ask the database too, now and then: a word on the channel may have been lost."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            if running := list(self._runner.scopes):
                for request_id in await asyncio.to_thread(self._cancelled, running):
                    self._runner.stop(request_id)

    def _cancelled(self, running: list[str]) -> list[str]:
        try:
            return self._database.read(lambda connection: lifecycle.to_stop(connection, running))
        except DatabaseUnavailable:
            return []

    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self._engine.check_health()
            except EngineDead:
                self._die()
                return

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        # Without one of them requests would run and never end, so the worker had better be replaced.
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("a background task of the worker failed with %s", type(error).__name__)
            self._die()

    def _die(self) -> None:
        if self._state != "dead":
            self._state = "dead"
            self._on_dead()

    async def _beat(self) -> None:
        report = {"worker": self._worker, "state": self._state, "model": self._settings.engine.model_name}
        report["running"] = str(len(self._running))
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.heartbeat(self._worker), json.dumps(report), ex=TTL_S)
            pipe.sadd(self._keys.workers, self._worker)
            await pipe.execute()

    async def _forever(self, work: Callable[[], Awaitable[None]], every_s: float) -> None:
        """Do `work` every `every_s` seconds, through times when Redis is away."""
        while True:
            try:
                await work()
            except redis.RedisError as error:
                logger.warning("redis did not take it: %s", type(error).__name__)
            await asyncio.sleep(every_s)


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they end: a client library may turn a cancellation into an error of its own."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.5)
