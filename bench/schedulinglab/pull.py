"""Workers that pull, with the production code on both sides of the queue.

The queue is `VirtualQueue`. Each worker has the admission rule of production (worker_gpu/admission.py), asks the queue
whenever it would there (something ended, a first token came, it was woken, the queue said when to look again), and reports what its cache holds
as soon as production would: REPORT_S after something changed, else once a second.

A worker that dies says nothing more. Its requests come back when their leases have ended, as in production.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import redis

from bench.schedulinglab.fleet import Fleet, Run, Worker
from bench.schedulinglab.held import Held
from bench.schedulinglab.virtual_queue import VirtualQueue
from bench.schedulinglab.workload import SALT
from tasks.queueing.leases import grace_s
from tasks.queueing.pull import Report, Strategy, Wish
from tasks.settings import SchedulingGroup
from worker_gpu.admission import Admission, Memory, Share, Taken, takes_more
from worker_gpu.freshness import LOOK_EVERY_S, Freshness, one_token_of

REPORT_S, TICK_S, RESTORE_S, RESTORED_AT_ONCE = 0.05, 1.0, 5.0, 1_000
#: What passes between two looks at the queue, which in virtual time would otherwise take none.
LOOK_S = 0.001
LEASE_S: float = SchedulingGroup().lease_s


class Puller:
    """One worker's side of the queue."""

    def __init__(self, rule: Pull, worker: Worker) -> None:
        self.rule, self.worker = rule, worker
        self.held = Held(worker)
        options = worker.fleet.options
        self.admission = Admission(worker.name, options.max_num_seqs, options.max_batch_tokens)
        self.freshness = Freshness()
        worker.batch.events.subscribe(self.freshness.hear)
        self.blocks = True
        self._looked_at = 0.0
        self._capacity = options.num_blocks * options.block_size
        self._taken: dict[int, Taken] = {}
        self._reports, self._full, self._report_due = 0, True, False
        self._served: dict[str, int] = {}
        self._look_at = float("inf")

    def ask(self) -> None:
        """Take what the queue gives, until it gives nothing or there is no room."""
        worker, queue = self.worker, self.rule.queue
        if not worker.alive:
            return
        while takes_more(wish := self._wish()):
            tags, next_s, decision, left = queue.reserve(worker.name, wish)
            self.blocks = False
            for tag in tags:
                self._deliver(self.rule.runs[int(tag)], decision)
            if not (tags and left):
                self.blocks = True
                if next_s is not None:
                    self._look_again(next_s)
                break
        else:
            self.blocks = False
        if self.held.changed and not self._report_due:
            self._report_due = True
            worker.fleet.at(worker.fleet.now + REPORT_S, self.report)

    def report(self) -> None:
        """Say what changed."""
        worker, queue = self.worker, self.rule.queue
        self._report_due = False
        if not worker.alive:
            return
        queue.now = worker.fleet.now
        # Output tokens are counted at each request's end; production counts them as they come.
        self._reports += 1
        report = Report(
            worker.name, "1", self._reports, self._full, self.held.changes(), {"load": self._wish().load}, self._served
        )
        self._full, self._served = False, {}
        if queue.report(report):
            raise RuntimeError("the queue lost count of a worker's reports")
        self.rule.wake()

    def progress(self, firsts: list[Run], lasts: list[Run]) -> None:
        """Note first tokens and ends."""
        now = self.worker.fleet.now
        for run in firsts:
            self.admission.begin(self._taken[run.ask.number], run.cached_tokens, now - run.scheduled_at, now)
        self._keep_fresh()
        for run in lasts:
            self.admission.end(self._taken.pop(run.ask.number))
            self.rule.queue.run("drop", str(run.ask.number))
            organization = run.ask.organization
            self._served[organization] = self._served.get(organization, 0) + run.output_tokens

    def _deliver(self, run: Run, decision: dict[str, Any]) -> None:
        ask = run.ask
        self.held.learn(self.worker.fleet, ask.profile, ask.organization)
        cached = decision["candidates"][0]["cached"] if decision else 0
        share = Share(ask.organization, ask.profile.name, ask.profile.tokens)
        self._taken[ask.number] = self.admission.deliver(ask.tokens, cached, share)
        salt = f"{SALT}:{ask.organization}"
        self.freshness.use(ask.profile.name, ask.profile.token_ids, salt, self.worker.fleet.now)
        self.worker.submit(run)

    def _keep_fresh(self) -> None:
        """Use what is about to be evicted, as worker_gpu/freshness.py does."""
        now = self.worker.fleet.now
        if not self.rule.keeps_fresh or self.worker.unasked or now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        left = self.admission.beside_running(self.worker.batch.load, self._memory)
        due = self.freshness.due(
            left.capacity_tokens, left.free_tokens, self.admission.places, now, self.held.tokens_of
        )
        for profile, use in due.items():
            request = one_token_of(profile, use)
            share = Share("", profile, len(use.token_ids))
            taken = self.admission.deliver(len(request.prompt_token_ids), len(use.token_ids), share)
            self.worker.submit_unasked(request, partial(self.admission.end, taken))

    @property
    def _memory(self) -> Memory:
        return Memory(self._capacity, self.held.free_tokens)

    def _wish(self) -> Wish:
        wish, said = self.admission.wish(self.worker.batch.load, self._memory), self.rule.parameters
        affinity, patience = said.get("affinity", wish.affinity), said.get("patience", wish.patience)
        return replace(wish, affinity=affinity, patience=patience)

    def _look_again(self, in_s: float) -> None:
        at = self.worker.fleet.now + max(in_s, LOOK_S)
        if at < self._look_at or self._look_at <= self.worker.fleet.now:
            self._look_at = at
            self.worker.fleet.at(at, self._look)

    def _look(self) -> None:
        if self.blocks:
            self.rule.serve(self)


class Pull:
    """The queue and its workers, under one of the queue's strategies."""

    def __init__(
        self,
        client: redis.Redis,
        strategy: Strategy,
        parameters: Mapping[str, float] | None = None,
        *,
        keeps_fresh: bool = True,
    ) -> None:
        self._client, self._strategy = client, strategy
        #: What the wishes say of the strategy's parameters; what is not said is as in production.
        self.parameters = dict(parameters or {})
        self.keeps_fresh = keeps_fresh
        self.runs: dict[int, Run] = {}
        self.fleet: Fleet
        self.queue: VirtualQueue
        self._unfinished = 0

    def start(self, fleet: Fleet) -> None:
        """Make an empty queue, and have every worker ask once."""
        self.fleet = fleet
        self.queue = VirtualQueue(self._client, self._strategy, [worker.name for worker in fleet.workers])
        self.pullers = [Puller(self, worker) for worker in fleet.workers]
        for puller in self.pullers:
            puller.report()
            self.serve(puller)
        self._tick()

    def arrive(self, run: Run) -> None:
        """Publish the request, and serve whoever is woken."""
        self.runs[run.ask.number] = run
        self._unfinished += 1
        self.queue.now = self.fleet.now
        self.queue.put(run.ask, str(run.ask.number))
        self.wake()

    def progress(self, worker: Worker, firsts: list[Run], lasts: list[Run]) -> None:
        """Have the worker ask for more."""
        puller = self.pullers[worker.number]
        self.queue.now = self.fleet.now
        self._unfinished -= len(lasts)
        puller.progress(firsts, lasts)
        self.serve(puller)

    def lost(self, worker: Worker, runs: list[Run]) -> None:
        """Leave everything to the leases."""

    def serve(self, puller: Puller) -> None:
        """Have a worker ask, and whoever that wakes."""
        self.queue.now = self.fleet.now
        puller.ask()
        self.wake()

    def wake(self) -> None:
        """Have those workers ask that block on a marker which is there."""
        while True:
            marked = self.queue.marked
            woken = next(
                (p for p in self.pullers if p.blocks and p.worker.alive and (marked[p.worker.number] or marked[-1])),
                None,
            )
            if woken is None:
                return
            self.queue.take_marker(woken.worker.number)
            woken.ask()

    def close(self) -> None:
        """Hold nothing: the client is the caller's."""

    def _tick(self) -> None:
        """Do what happens every second, for as long as there are requests."""
        now = self.queue.now = self.fleet.now
        for puller in self.pullers:
            puller.report()
        if now % RESTORE_S < TICK_S:
            self._renew()
            self.queue.run("restore", LEASE_S, RESTORED_AT_ONCE, grace_s(LEASE_S))
            self.wake()
        if self._unfinished or self.fleet.arriving:
            self.fleet.at(now + TICK_S, self._tick)

    def _renew(self) -> None:
        for puller in self.pullers:
            if puller.worker.alive and puller.worker.in_hand:
                self.queue.run("renew", puller.worker.name, *puller.worker.in_hand)
