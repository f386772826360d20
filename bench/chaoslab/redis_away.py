"""Redis is killed, emptied and replaced, and connections to it are cut, under load.

The harm comes in four parts, while a crowd goes on asking:

1. Connections of the workers are cut one by one (CLIENT KILL). The work they run goes on and must not run twice.
2. Redis is killed with SIGKILL and started again on its log, at random with `appendfsync` `always` or `everysec`. A killed
   process loses nothing with either, as the kernel has what was written; with `everysec` a machine that loses its power
   loses up to a second, which is a smaller case of the next two.
3. FLUSHALL: Redis forgets everything, queue, leases and streams.
4. Another, empty Redis takes its place, and the housekeeper, who would notice, is killed just before.

Nothing may be lost in any of them, and workers begin attempts again within five seconds of Redis's return from a kill.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import psutil
import redis
import sqlalchemy as sa

from bench.chaoslab import recovery
from bench.chaoslab.calm import again_and_again, ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.lab import Lab, Outcome, quantile
from bench.chaoslab.process import Process
from bench.chaoslab.record import Record, read, seconds
from bench.chaoslab.site import Plan, Site

DROPS, KILLS = 50, 50
PLAN = Plan(workers=2, engine={"tokens_per_s_per_sequence": 40.0})
TOKENS = (10, 50)
#: Twice as many as the workers run: the other half waits in the queue, to be lost with it.
AT_ONCE = 4 * PLAN.slots
BETWEEN_DROPS_S = (0.1, 0.6)
AWAY_S = (0.0, 1.5)
SETTLE_S = (0.5, 1.5)
BACK_WITHIN_S = 5.0
#: A worker that begins nothing for so long does not come back.
NEVER_S = 60.0
END_S = 300.0
_LAST_START = "SELECT max(occurred_at) FROM audit_events WHERE kind = 'started' AND worker = :worker"


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("redis")
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        calm = ask_calmly(site, questions(rng, 24, TOKENS), lab.seed)
        asked = again_and_again(random.Random(lab.seed), list(calm))
        with Crowd(site.urls, site.key, asked, seed=lab.seed, at_once=AT_ONCE) as crowd:
            site.progress = crowd.progress
            site.until(lambda: crowd.finished > 0, END_S, "the first answers")
            drops_began = time.time()
            dropped = sum(_drop(site, rng) for _ in range(lab.count(DROPS)))
            # A lease that was not renewed shows up as a second attempt once it has ended.
            site.wait(2 * PLAN.lease_s)
            drops_ended = time.time()
            back = [_kill(site, rng) for _ in range(lab.count(KILLS))]
            flushed = _forget(site, crowd, lambda: _flush(site))
            site.kill_one(site.housekeepers, rng)
            replaced = _forget(site, crowd, site.redis.replace)
            crowd.enough()
            site.see_out(crowd)
        record = read(site.database_url)
    verdict = judge(record, crowd.told, calm)
    figures = {
        "requests": float(len(record.rows)),
        "connections_dropped": float(dropped),
        "kills": float(len(back)),
        "run_twice_by_a_drop": float(_second_attempts(record, drops_began, drops_ended)),
        "workers_back_p50_s": quantile(back, 0.5),
        "workers_back_max_s": max(back),
        "all_ended_after_flushall_s": flushed,
        "all_ended_after_replacement_s": replaced,
        "run_again_share": recovery.run_again(record),
        **verdict.broken,
    }
    targets = {
        **verdict.targets(),
        "run_twice_by_a_drop": ("<=", 0.0),
        "workers_back_max_s": ("<=", BACK_WITHIN_S),
    }
    return Outcome(figures, targets, verdict.examples, timed=["workers_back_max_s"])


def _drop(site: Site, rng: random.Random) -> bool:
    """Cut one connection of a worker; tell whether there was one."""
    ports = {
        connection.laddr.port
        for worker in site.workers
        if worker.pid is not None
        for connection in psutil.Process(worker.pid).net_connections("tcp4")
        if connection.raddr and connection.raddr.port == site.redis.port
    }
    with redis.Redis(port=site.redis.port) as client:
        theirs = [entry for entry in client.client_list() if int(entry["addr"].rpartition(":")[2]) in ports]
        if theirs:
            client.client_kill_filter(_id=rng.choice(theirs)["id"])
    site.wait(rng.uniform(*BETWEEN_DROPS_S))
    return bool(theirs)


def _kill(site: Site, rng: random.Random) -> float:
    """Kill Redis and start it again after a moment; return the seconds until the last worker began an attempt."""
    site.redis.kill()
    site.wait(rng.uniform(*AWAY_S))
    site.redis.fsync = rng.choice(("always", "everysec"))
    site.redis.start()
    returned = time.time()
    starts = _Starts(site)
    try:
        site.until(lambda: all(starts.last(worker) > returned for worker in site.workers), NEVER_S, "every worker")
    finally:
        starts.close()
    took = time.time() - returned
    site.wait(rng.uniform(*SETTLE_S))
    return took


def _flush(site: Site) -> None:
    with redis.Redis(port=site.redis.port) as client:
        client.flushall()


def _forget(site: Site, crowd: Crowd, forget: Callable[[], None]) -> float:
    """Have Redis lose everything; return the seconds until all that had been accepted before has ended."""
    forget()
    at = time.time()
    before = [told for told in [*crowd.told] if told.request_id is not None and told.ended_at is None]
    site.until(lambda: all(told.ended_at is not None or told.faults for told in before), END_S, "what was forgotten")
    return time.time() - at


def _second_attempts(record: Record, since: float, until: float) -> int:
    return sum(event.attempt > 1 and since <= event.at <= until for event in record.all_starts)


class _Starts:
    """Looks up when a worker last began an attempt."""

    def __init__(self, site: Site) -> None:
        self._engine = sa.create_engine(site.database_url)

    def last(self, worker: Process) -> float:
        """Return the instant, in seconds of the wall clock; 0 if it never did."""
        with self._engine.connect() as connection:
            at = connection.execute(sa.text(_LAST_START), {"worker": worker.name}).scalar()
        return seconds(at) if at else 0.0

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()
