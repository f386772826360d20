"""A worker without Celery, whose engine says what a test tells it to: everything else of it is as it runs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import redis
import sqlalchemy as sa
from redis.asyncio import Redis as AsyncRedis
from sqlalchemy.engine import Connection

from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.crypto import KeyWrapper, Signer, unseal
from tasks.db import Database
from tasks.governance.recheck import Recheck
from tasks.ids import new_request_id
from tasks.job import Job, Prompt, Result, Sampling
from tasks.queueing.decision import Decision
from tasks.queueing.keys import QueueKeys
from tasks.queueing.leases import Leases, process_holder
from tasks.queueing.message import MessageCodec
from tasks.queueing.publisher import Publisher
from tasks.queueing.scripts import Scripts
from tasks.schema import TERMINAL_KINDS, audit_events, requests
from tasks.settings import SchedulingGroup, StreamingGroup, settings
from tasks.stream import FIELD, Cursor, Frame, replay, stream_key
from tests.reserving import reserve_one
from tests.services import wait_until
from worker_gpu.background import cancel
from worker_gpu.cache import CacheIndex
from worker_gpu.delivery import Delivery
from worker_gpu.engines.base import Delta, EngineLimits, EngineLoad, GenerationRequest, TierRates
from worker_gpu.engines.kv_events import Subscriber
from worker_gpu.giving_back import Returns
from worker_gpu.patience import Patience
from worker_gpu.profiles import StaticPart, StaticParts
from worker_gpu.progress import Progress
from worker_gpu.records import Records
from worker_gpu.runner import Runner
from worker_gpu.scopes import Outcome
from worker_gpu.streams import StreamWriter

ORGANIZATION = "default"
#: For this long a test waits for what must come.
PATIENCE_S = 20.0
Script = Callable[[GenerationRequest], AsyncGenerator[Delta, None]]


def word(number: int, *, last: bool = False, choice: int = 0) -> Delta:
    """Return an engine's delta: the so-many-th token of its answer."""
    return Delta(
        text=f"{number} ",
        output_tokens=number,
        cached_tokens=4,
        prefill_s=0.25,
        finish_reason="stop" if last else None,
        choice=choice,
    )


async def three_words(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
    """Say what there is to say."""
    for number in (1, 2, 3):
        yield word(number, last=number == 3)


async def endless(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
    """Say two words, and never come to an end."""
    for number in (1, 2):
        yield word(number)
    await asyncio.Event().wait()


class ScriptedEngine:
    """Says what its script says. `running` has the requests that it holds a slot for; closing one may take a while."""

    limits = EngineLimits(max_model_len=4096, max_num_seqs=8, block_size=16)
    stall_s = 8.0

    def __init__(self) -> None:
        self.steps = 0
        self.script: Script = three_words
        self.running: set[str] = set()
        self.asked: list[GenerationRequest] = []
        self.closing_s = 0.0

    @property
    def load(self) -> EngineLoad:
        """Return that all it has runs."""
        return EngineLoad(running=len(self.running))

    @property
    def tier_rates(self) -> TierRates:
        """Return none."""
        return TierRates()

    @property
    def busy(self) -> bool:
        """Tell whether it has requests."""
        return bool(self.running)

    async def start(self) -> None:
        """Be ready as it is."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self.asked.append(request)
        self.running.add(request.request_id)
        try:
            async with aclosing(self.script(request)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            try:
                await asyncio.sleep(self.closing_s)
            finally:
                self.running.discard(request.request_id)

    def block_hashes(self, _token_ids: Sequence[int], _cache_salt: str) -> list[bytes]:
        return []

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have nothing to tell of a cache."""

    def tell_again(self) -> None:
        """As `subscribe`."""

    async def check_health(self) -> None:
        """Be well."""

    async def stop(self) -> None:
        """Have nothing to end."""


@dataclass
class PlayedProgress:
    """Notes what a runner tells of its progress: the first tokens, and how often it began and ceased to wait for a turn."""

    begun: list[Delta] = field(default_factory=list)
    waits: int = 0
    waited: int = 0

    def begin(self, delta: Delta) -> None:
        self.begun.append(delta)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        self.waits += 1
        try:
            yield
        finally:
            self.waited += 1


@dataclass
class Message:
    """An admitted request, and the message that this worker has of it: `record` is what Redis has, `came_back` how often."""

    job: Job
    subject: Subject
    envelope: Any
    tag: str
    record: bytes = b""
    came_back: int = 0
    decision: Decision | None = None
    progress: PlayedProgress = field(default_factory=PlayedProgress)


@dataclass
class Worker:
    """A runner with what it needs, and what a test wants to know of it."""

    runner: Runner
    engine: ScriptedEngine
    database: Database
    codec: MessageCodec
    keys: KeyWrapper
    client: redis.Redis
    redis_keys: QueueKeys
    leases: Leases
    lost: list[str]
    asking: AsyncRedis
    taken: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    tasks: list[asyncio.Task[Outcome]] = field(default_factory=list)

    def message(self, *, n: int = 1, decision: Mapping[str, Any] | None = None, **columns: Any) -> Message:
        """Admit a request, and lease its message to this worker."""
        subject = Subject(new_request_id(), ORGANIZATION, "key_1", "incident-responder")
        data_key, wrapped = self.keys.new_key(subject.request_id)
        facts = {"api": "tasks", "priority": "normal", "deadline": None, **columns}
        job = Job(
            request_id=subject.request_id,
            epoch=lifecycle.FIRST_EPOCH,
            organization=ORGANIZATION,
            prompt=Prompt("ab" * 32, (7, 8), 5),
            sampling=Sampling(seed=1, n=n),
            published_at=time.time() - 0.5,
            data_key=data_key,
        )
        sealed = self.codec.sealed(job)
        admission = lifecycle.Admission(
            subject, decision or {}, "ab" * 32, wrapped, b"payload", facts, None, sealed, job.prompt.token_count
        )
        self.database.write(lambda on: lifecycle.admit(on, admission))
        queued = self.codec.encode(job, wrapped, sealed)
        Publisher(self.client, self.redis_keys).publish(queued)
        [[envelope], *_] = json.loads(json.loads(queued.message)["body"])
        message = Message(job, subject, envelope, queued.tag)
        self.take(message)
        return message

    def republish(self, message: Message) -> Message:
        """Have Redis lose a message and the housekeeper publish it again; return the new one, taken."""
        row = self.row(message)
        again = self.database.write(
            lambda on: lifecycle.republish(on, row.request_id, row.epoch, row.attempt, max_epochs=9)
        )
        assert again is not None
        queued = self.codec.again(again)
        Publisher(self.client, self.redis_keys).publish(queued)
        [[envelope], *_] = json.loads(json.loads(queued.message)["body"])
        newer = Message(replace(message.job, epoch=again.epoch), message.subject, envelope, queued.tag)
        self.take(newer)
        return newer

    def take(self, message: Message) -> None:
        """Take a message from the queue once it is there."""
        reserve = Scripts(self.client, self.redis_keys)

        def is_taken() -> bool:
            if (found := reserve_one(reserve, process_holder())) is not None:
                self.taken[found[0].decode()] = found[1], found[2]
            return message.tag in self.taken

        wait_until(is_taken, PATIENCE_S, f"message {message.tag}")
        message.record, message.came_back = self.taken.pop(message.tag)
        self.leases.hold(message.tag, message.record)

    def run(self, message: Message) -> asyncio.Task[Outcome]:
        """Begin to run a message."""
        delivery = Delivery(message.tag, message.record, message.came_back, message.envelope, message.decision)
        running = self.runner.run(delivery, cast("Progress", message.progress))
        self.tasks.append(asyncio.create_task(running))
        return self.tasks[-1]

    async def run_again(self, message: Message) -> asyncio.Task[Outcome]:
        """Take a message that was given back, once it is due, and begin to run it."""
        await asyncio.to_thread(self.take, message)
        return self.run(message)

    async def running(self, message: Message, attempt: int = 1, words: int = 2) -> asyncio.Task[Outcome]:
        """Begin to run a message; return once so many words of it are in Redis."""
        task = self.run(message)
        said = "".join(f"{number} " for number in range(1, words + 1))
        await until(lambda: self.text(message, attempt) == said)
        return task

    def cancel(self, message: Message) -> None:
        """Cancel a request as the gateway does, and have the worker hear of it."""
        self.database.write(lambda on: lifecycle.cancel(on, message.job.request_id, ORGANIZATION))
        self.runner.scopes.stop(message.job.request_id, "cancelled")

    def row(self, message: Message) -> sa.Row[Any]:
        """Return the request's row."""
        query = sa.select(requests).where(requests.c.request_id == message.job.request_id)
        return self.database.read(lambda on: on.execute(query).one())

    def terminal_event(self, message: Message) -> sa.Row[Any]:
        """Return the request's only terminal event."""
        query = sa.select(audit_events).where(
            audit_events.c.request_id == message.job.request_id, audit_events.c.kind.in_(TERMINAL_KINDS)
        )
        return self.database.read(lambda on: on.execute(query).one())

    def result(self, message: Message) -> Result:
        """Return what is stored of the answer."""
        context = f"result:{message.job.request_id}"
        return Result.model_validate_json(unseal(message.job.data_key, self.row(message).result, context))

    def frames(self, message: Message) -> list[Frame]:
        """Return the frames that Redis has."""
        key = stream_key(self.redis_keys.prefix, message.job.request_id)
        entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", self.client.xrange(key))
        return [
            Frame.unseal(message.job.data_key, message.job.request_id, Cursor.parse(entry_id.decode()), fields[FIELD])
            for entry_id, fields in entries
        ]

    def text(self, message: Message, attempt: int = 1) -> str:
        """Return the text that an attempt's watchers see."""
        shown = [frame for frame in self.frames(message) if frame.cursor.attempt == attempt]
        return "".join(frame.data.get("text", "") for frame in shown)

    def is_leased(self, message: Message) -> bool:
        """Tell whether the message is still held."""
        return self.client.zscore(self.redis_keys.named("leases"), message.tag) is not None

    def is_queued(self, message: Message) -> bool:
        """Tell whether the queue has the message, to be given to whoever asks, now or later."""
        return bool(self.client.hexists(self.redis_keys.named("messages"), message.tag)) and not self.is_leased(message)

    def wait_until_let_go(self, message: Message) -> None:
        """Wait until Redis has heard that the message is not held any more."""
        wait_until(lambda: not self.is_leased(message), PATIENCE_S, "the message to be let go")

    def kinds(self, message: Message) -> list[tuple[str, str | None]]:
        """Return the kind and code of the request's events, in the order in which they were written."""
        query = sa.select(audit_events.c.kind, audit_events.c.code)
        query = query.where(audit_events.c.request_id == message.job.request_id).order_by(audit_events.c.occurred_at)
        return [(kind, code) for kind, code in self.database.read(lambda on: on.execute(query).all())]

    def check_end(self, message: Message, state: str, code: str | None) -> None:
        """Check that the request ended like this, once, and that what is stored is what its watchers saw."""
        row, event = self.row(message), self.terminal_event(message)
        assert (row.state, row.error_code) == (state, code)
        assert (event.kind, event.code, event.attempt) == (state, code, row.attempt)
        last = [frame for frame in self.frames(message) if frame.cursor.attempt == row.attempt]
        if row.result is not None:
            assert last == list(replay(row.attempt, self.result(message), state, code))
        assert (last[-1].event, last[-1].terminal) == (state, True)
        self.wait_until_let_go(message)
        assert not self.is_queued(message)
        assert self.engine.running == set()
        assert len(self.runner.scopes) == 0


async def until(condition: Callable[[], object]) -> None:
    """Return once `condition` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


class Agreeing:
    """Finds nothing that forbids a request to run."""

    asks_projects = False

    def by_record(self, _connection: Connection, _request_id: str) -> None:
        return None


class Shelf:
    """Has every profile's static part at hand, or only after a while."""

    def __init__(self) -> None:
        self.available = asyncio.Event()
        self.available.set()

    async def get(self, _static_profile_hash: str) -> StaticPart:
        await self.available.wait()
        return StaticPart([1, 2, 3])


@asynccontextmanager
async def working() -> AsyncIterator[Worker]:
    """Run a worker on the configured services."""
    configured = settings()
    keys, engine = KeyWrapper(configured.secrets.keys("master_key")), ScriptedEngine()
    codec = MessageCodec(Signer(configured.secrets.keys("signing_key")), keys)
    redis_keys = QueueKeys(configured.gateway.key_prefix)
    url = configured.gateway.request_queue_url
    database = Database(configured.database)
    lost: list[str] = []
    async with AsyncRedis.from_url(url) as client:
        streams = StreamWriter(client, redis_keys.prefix, StreamingGroup(join_ms=1))
        leases = Leases(lambda: redis.Redis.from_url(url), redis_keys, process_holder(), 60.0, lost.append)
        leases.start()
        records = Records(database)
        scheduling = SchedulingGroup(max_attempts=3, retry_first_s=0.1, retry_max_s=0.2)
        runner = Runner(
            engine=engine,
            engine_name="simulated",
            records=records,
            codec=codec,
            static_parts=cast("StaticParts", Shelf()),
            streams=streams,
            returns=Returns(records, leases, scheduling),
            worker="gpu@test",
            model="tiny",
            max_attempts=scheduling.max_attempts,
            salt=b"salt" * 8,
            recheck=cast("Recheck", Agreeing()),
            patience=Patience(client, redis_keys.prefix, 0.0),
            cache=CacheIndex(engine, 3600),
        )
        sending = asyncio.create_task(streams.send_forever())
        with redis.Redis.from_url(url) as looking:
            worker = Worker(runner, engine, database, codec, keys, looking, redis_keys, leases, lost, client)
            try:
                yield worker
            finally:
                await cancel([*worker.tasks, sending])
                await asyncio.gather(*worker.tasks, sending, return_exceptions=True)
                await asyncio.to_thread(leases.close)
                await asyncio.to_thread(database.close)


def with_worker(work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    """Have a test work with a worker, on a loop of its own."""

    async def run() -> None:
        async with asyncio.timeout(2 * PATIENCE_S), working() as worker:
            await work(worker)

    asyncio.run(run())
