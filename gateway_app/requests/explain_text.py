"""A decision in words and as a table, for a terminal. Times are given from the instant of the decision on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gateway_app.requests.explain import Attempt, Replayed
from tasks.queueing.decision import Candidate, Decision
from tasks.queueing.pull import Strategy

_HEADER = ("profile", "waiting", "waited", "cached", "to compute", "elsewhere", "price", "might go")


def lines(attempt: Attempt, replayed: Replayed | None) -> Iterator[str]:
    """Yield what there is to say of an attempt, and of what another strategy makes of its decision."""
    began = f"{attempt.started_at:%Y-%m-%d %H:%M:%S.%f}"[:-3]
    yield f"attempt {attempt.number} began on {attempt.worker} at {began}Z"
    decision = attempt.decision
    if decision is None:
        yield "  no decision is recorded for it"
        return
    yield f"  strategy {decision.strategy}; the worker took a batch of {decision.batch}"
    yield ""
    yield from _table(attempt, decision)
    yield ""
    yield from (f"  {sentence}" for sentence in _why(attempt, decision))
    yield f"  {_expected(attempt, decision)}"
    if replayed is not None:
        yield f"  {_replayed(attempt, decision, replayed)}"


def _table(attempt: Attempt, decision: Decision) -> Iterator[str]:
    rows = [_HEADER, *(_row(attempt, one, decision.at) for one in decision.candidates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for index, row in enumerate(rows):
        mark = "*" if index == decision.chosen + 1 else " "
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield f"{mark} {'  '.join(cells)}"


def _row(attempt: Attempt, one: Candidate, at: float) -> tuple[str, ...]:
    return (
        attempt.name(one.profile),
        str(one.waiting),
        f"{one.waited:.2f} s",
        f"{one.cached}/{one.static}",
        f"{one.seconds:.3f} s",
        str(one.copies),
        "-" if one.price is None else f"{one.price - at:+.3f} s",
        _when(one, at),
    )


def _when(one: Candidate, at: float) -> str:
    return "now" if one.eligible_at <= at else f"in {one.eligible_at - at:.2f} s"


def _why(attempt: Attempt, decision: Decision) -> Iterator[str]:
    winner, facts = decision.winner, decision.worker_facts
    left = [one for one in decision.candidates if _when(one, decision.at) != "now"]
    waited = decision.at - winner.turn
    turn = f"its turn had come {waited:.2f} s before" if waited >= 0 else f"its turn would have come in {-waited:.2f} s"
    yield _BECAUSE[decision.strategy](len(decision.candidates) - len(left), turn)
    if decision.strategy != "cache_aware_continuous":
        return
    if winner.seconds:
        yield (
            f"What its profile lacks in this worker's KV cache takes {winner.seconds:.3f} s, and counts as"
            f" {winner.seconds * facts.affinity:.2f} s of waiting."
        )
    else:
        yield "Its profile is in this worker's KV cache, so that nothing is added to its price."
    for one in left:
        name = attempt.name(one.profile)
        if one.filling is not None:
            yield f"{name} is being computed by this worker, and what waits for it then goes together."
        else:
            yield (
                f"{name} is left to {_others(one.copies)}: what waits has waited {one.waited:.2f} s together,"
                f" too little to pay for one more copy."
            )


_BECAUSE: dict[Strategy, Callable[[int, str], str]] = {
    "cache_aware_continuous": lambda count, turn: (
        f"It had the lowest price of {count} that might go: {turn}." if count > 1 else f"Nothing else might go: {turn}."
    ),
    "fifo": lambda _count, turn: f"It came first: {turn}.",
    "least_loaded": lambda _count, turn: f"It came first, and no worker with room had less in hand: {turn}.",
    "round_robin": lambda _count, turn: f"It came first, and this was the next worker with room: {turn}.",
}


def _others(count: int) -> str:
    return "the other worker that holds it" if count == 1 else f"the {count} others that hold it"


def _expected(attempt: Attempt, decision: Decision) -> str:
    expected = (
        f"{decision.predicted_tokens} of the profile's {decision.winner.static} tokens were expected in the KV cache"
    )
    if attempt.cached_tokens is None:
        return f"{expected}; how many were found is not recorded."
    return f"{expected}; {attempt.cached_tokens} of the prompt's {attempt.prompt_tokens} were found."


def _replayed(attempt: Attempt, decision: Decision, replayed: Replayed) -> str:
    if replayed.chosen is None:
        return f"Under {replayed.strategy} none of these would have gone to this worker at that moment."
    if replayed.chosen == decision.chosen:
        return f"Under {replayed.strategy} the same would have been chosen."
    return f"Under {replayed.strategy} {attempt.name(decision.candidates[replayed.chosen].profile)} would have been chosen."
