"""The one place where a worker's parts are made and handed to one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from redis.asyncio import Redis

from tasks.crypto import KeyWrapper, Signer
from tasks.db import Database
from tasks.governance.metaqore import make_projects
from tasks.governance.policies import default_policy
from tasks.governance.psmp import Projects
from tasks.governance.recheck import Recheck
from tasks.prompts.tokenizer import ModelTokenizer, resolve_checkpoint
from tasks.queueing.connecting import connect, connect_async
from tasks.queueing.keys import QueueKeys
from tasks.queueing.leases import Leases, process_holder
from tasks.queueing.message import MessageCodec
from tasks.settings import Settings
from worker_gpu.admission import Admission
from worker_gpu.cache import CacheIndex
from worker_gpu.cancels import Cancels
from worker_gpu.engines import create_engine
from worker_gpu.engines.base import Engine
from worker_gpu.facts import Facts
from worker_gpu.giving_back import Returns
from worker_gpu.heart import Heart
from worker_gpu.patience import Patience
from worker_gpu.profiles import StaticParts
from worker_gpu.pulling import Pulling
from worker_gpu.records import Records
from worker_gpu.reporting import Reporter
from worker_gpu.runner import Runner
from worker_gpu.streams import StreamWriter


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is made of. `redis` is the loop's client; the leases have one of their own."""

    database: Database
    projects: Projects | None
    redis: Redis
    leases: Leases
    engine: Engine
    streams: StreamWriter
    runner: Runner
    cancels: Cancels
    heart: Heart
    admission: Admission
    cache: CacheIndex
    pulling: Pulling
    reporter: Reporter

    def close(self) -> None:
        """Let go of what does not belong to the loop."""
        self.database.close()
        if self.projects is not None:
            self.projects.close()


def make_parts(settings: Settings, worker: str, on_lost: Callable[[str], None], running: Callable[[], int]) -> Parts:
    """Return the parts of `worker`, none of which does anything yet; call it on the loop.

    `on_lost` is called by the leases' thread with the tag of a message that is another's by now; `running` tells how many
    requests run. Raises ConfigurationError.
    """
    keys = QueueKeys(settings.gateway.key_prefix)
    url, timeout_s = settings.gateway.request_queue_url, settings.gateway.redis_timeout_s
    lease_s = settings.scheduling.lease_s
    engine = create_engine(settings)
    cache = CacheIndex(engine, settings.caching.radix_tree_ttl_seconds)
    wrapper = KeyWrapper(settings.secrets.keys("master_key"))
    checkpoint = resolve_checkpoint(settings.engine.model_source, settings.engine.revision)
    database, projects, client = Database(settings.database), make_projects(settings), connect_async(url, timeout_s)
    records = Records(database)
    leases = Leases(lambda: connect(url, timeout_s, 1), keys, process_holder(), lease_s, on_lost)
    streams = StreamWriter(client, settings.gateway.key_prefix, settings.streaming)
    runner = Runner(
        engine=engine,
        engine_name=settings.engine.kind,
        records=records,
        codec=MessageCodec(Signer(settings.secrets.keys("signing_key")), wrapper),
        static_parts=StaticParts(database, wrapper, ModelTokenizer(checkpoint).fingerprint),
        streams=streams,
        returns=Returns(records, leases, settings.scheduling),
        worker=worker,
        model=settings.engine.model_name,
        max_attempts=settings.scheduling.max_attempts,
        salt=settings.secrets.keys("organization_salt")[0],
        recheck=Recheck(database, default_policy(settings.governance), projects),
        patience=Patience(client, settings.gateway.key_prefix, settings.metaqore.patience_s),
        cache=cache,
    )
    cancels = Cancels(database, client, keys, runner.scopes)
    heart = Heart(client, keys, worker, settings.engine.model_name, running)
    admission = Admission(worker, settings.engine.max_num_seqs, settings.scheduling.max_batch_tokens)
    facts = Facts(settings.engine.model_name, engine, cache, admission, heart)
    reporter = Reporter(client, keys, worker, cache, facts.report, runner.served)
    cache.when_changed(reporter.changed)
    engine.subscribe(runner.freshness.hear)
    return Parts(
        database=database,
        projects=projects,
        redis=client,
        leases=leases,
        engine=engine,
        streams=streams,
        runner=runner,
        cancels=cancels,
        heart=heart,
        admission=admission,
        cache=cache,
        pulling=Pulling(admission, engine, facts),
        reporter=reporter,
    )
