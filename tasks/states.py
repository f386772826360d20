"""The states of a request, and every step from one to another: who takes it, by which function, and what fences it off.

This table is what the rest is held against: docs/reliability.md draws it, and a test compares; the state machine that
tests drive at random checks that each request's audit events are a path through it. The steps themselves are code:
`tasks/lifecycle/` in SQL, the scripts of `tasks/queueing/` in Redis.

Two states are not written in SQL, where such a request is `queued`: `admitted` is what is committed and not yet in
Redis, and `leased` is what a worker has taken out of its list there and not yet begun. Nothing is lost by that: whatever
happens to Redis, a request is still queued.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: Where there is no request yet.
NOTHING = "nothing"

_ONCE = "an id is recorded once"
_SCRIPT = "one script changes list and lease"
_HOLDER = "the lease's tag and holder"
_EPOCH = "epoch"
_MINE = "epoch, attempt, and that it runs"
_SEEN = "epoch and attempt as they were seen"
_LOCK = "the row's lock"


@dataclass(frozen=True, slots=True)
class Step:
    """One way to get from any of `sources` to `target`.

    `by` is a function of `tasks.lifecycle`, or a script of `tasks/queueing/`; `kinds` are the audit events of which the
    step leaves one, if it leaves any; `fence` is what keeps a late or repeated step from having an effect.
    """

    sources: tuple[str, ...]
    target: str
    by: str
    actor: str
    kinds: tuple[str, ...]
    fence: str


STEPS = (
    Step((NOTHING,), "received", "admit", "gateway", ("received",), _ONCE),
    Step((NOTHING,), "received", "refuse", "gateway", ("received",), _ONCE),
    Step(("received",), "failed", "refuse", "gateway", ("vetoed", "failed"), _ONCE),
    Step(("received",), "admitted", "admit", "gateway", ("admitted",), _ONCE),
    Step(("admitted",), "queued", "put.lua", "gateway", (), "the message's tag: id and epoch"),
    Step(("queued",), "leased", "reserve.lua", "worker", (), _SCRIPT),
    Step(("leased",), "queued", "give_back.lua", "worker", (), _HOLDER),
    Step(("leased",), "queued", "restore.lua", "worker", (), _SCRIPT),
    Step(("leased", "running"), "running", "start", "worker", ("started",), _EPOCH),
    Step(("running",), "queued", "give_back", "worker", ("requeued",), _MINE),
    Step(("admitted", "queued", "leased", "running"), "queued", "republish", "housekeeper", ("requeued",), _SEEN),
    Step(("running",), "completed", "answer", "worker", ("completed",), _MINE),
    Step(("running",), "failed", "finish", "worker", ("failed",), _MINE),
    Step(("leased", "running"), "failed", "start", "worker", ("vetoed", "failed"), _EPOCH),
    Step(("admitted", "queued", "leased"), "cancelled", "cancel", "gateway, worker", ("cancelled",), _LOCK),
    Step(("running",), "cancelled", "answer", "worker", ("cancelled",), _MINE),
    Step(("running",), "cancelled", "give_back", "worker", ("cancelled",), _MINE),
    Step(("running",), "cancelled", "start", "worker", ("cancelled",), _EPOCH),
    Step(("running",), "cancelled", "republish", "housekeeper", ("cancelled",), _SEEN),
    Step(("admitted", "queued", "leased"), "expired", "expire", "gateway", ("expired",), _LOCK),
    Step(("admitted", "queued", "leased"), "expired", "expire_overdue", "housekeeper", ("expired",), _LOCK),
    Step(("running",), "expired", "answer", "worker", ("expired",), _MINE),
    Step(("running",), "expired", "give_back", "worker", ("expired",), _MINE),
    Step(("leased", "running"), "expired", "start", "worker", ("expired",), _EPOCH),
    Step(("admitted", "queued", "leased", "running"), "expired", "republish", "housekeeper", ("expired",), _SEEN),
    Step(("running",), "dead", "give_back", "worker", ("dead",), _MINE),
    Step(("leased", "running"), "dead", "start", "worker", ("dead",), _EPOCH),
    Step(("admitted", "queued", "leased", "running"), "dead", "republish", "housekeeper", ("dead",), _SEEN),
)


def reached(kinds: Iterable[str]) -> frozenset[str]:
    """Return the states that a request with audit events of these `kinds`, in order, may be in.

    There are several where the last steps left no event. There is none where the events are no path through the table:
    such a record cannot have come about.
    """
    here = frozenset({NOTHING})
    for kind in kinds:
        here = _silently(
            frozenset(step.target for step in STEPS if kind in step.kinds and not here.isdisjoint(step.sources))
        )
    return here


def _silently(here: frozenset[str]) -> frozenset[str]:
    """Return the states with those that can be reached without leaving an event."""
    further = {step.target for step in STEPS if not step.kinds and not here.isdisjoint(step.sources)}
    return here if further <= here else _silently(here | further)
