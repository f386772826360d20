"""Runs: one rule in one scenario, from its name to its figures; several at once in processes of their own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar, get_args

import redis

from bench.schedulinglab.figures import Figures, figures
from bench.schedulinglab.fleet import Fleet, Rule, Run
from bench.schedulinglab.pull import Pull
from bench.schedulinglab.push import LeastLoaded, RoundRobin
from bench.schedulinglab.rivals import CacheAware, Dynamo, LlmD, PrefixHash
from bench.schedulinglab.scenarios import OPTIONS, SCENARIOS, WORKERS, Workload
from tasks.queueing.pull import Strategy
from tests.services import RedisServer
from worker_gpu.engines.simulated_options import SimulationOptions

T = TypeVar("T")
U = TypeVar("U")
OURS: Strategy = "cache_aware_continuous"
#: The queue's strategies: workers pull.
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
#: Routers: requests are pushed.
ROUTERS: dict[str, Callable[[int], Rule]] = {
    "cache_aware": CacheAware,
    "prefix_hash": PrefixHash,
    "llm-d": LlmD,
    "dynamo": Dynamo,
    "round_robin (push)": RoundRobin,
    "least_loaded (push)": LeastLoaded,
}
RULES: tuple[str, ...] = (*STRATEGIES, *ROUTERS)


@dataclass(frozen=True, slots=True)
class Job:
    """One run: `rate` is in requests a second."""

    rule: str
    scenario: str
    rate: float
    requests: int
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    job: Job
    figures: Figures


def run(job: Job) -> Outcome:
    """Run a job to its end."""
    workload = SCENARIOS[job.scenario](job.rate, job.requests, job.seed)
    fleet, runs = serve(job.rule, workload, job.seed)
    return Outcome(job, figures(fleet, workload, runs))


def serve(rule: str, workload: Workload, seed: int, options: SimulationOptions = OPTIONS) -> tuple[Fleet, list[Run]]:
    """Run a workload under a rule, by its name."""
    with ExitStack() as closing:
        strategy = next((strategy for strategy in STRATEGIES if strategy == rule), None)
        made = ROUTERS[rule](seed) if strategy is None else Pull(fresh_redis(closing), strategy)
        fleet = Fleet(made, WORKERS, options)
        return fleet, fleet.serve(workload.asks, workload.losses)


def in_processes(what: Callable[[T], U], each: Sequence[T], processes: int) -> list[U]:
    """Return what a function makes of each, several at once in processes of their own, and tell how many are done."""
    made: list[U] = []
    # A process that is forked off would share the parent's connections.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for one in pool.imap(what, each):
            made.append(one)
            print(f"{len(made)} of {len(each)} runs", file=sys.stderr, flush=True)
    return made


def fresh_redis(closing: ExitStack) -> redis.Redis:
    """Return a client of an empty Redis that writes nothing to the disk; both end with `closing`."""
    server = RedisServer()
    closing.callback(server.close)
    server.start()
    client = redis.Redis.from_url(server.url)
    closing.callback(client.close)
    client.config_set("appendonly", "no")
    return client
