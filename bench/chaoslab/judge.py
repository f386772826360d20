"""The judges: one reads the record in SQL, the other what the clients were told.

Of the record: every request in it has ended, with exactly one `received`, one `admitted` and one terminal event, which
agrees with its row; its attempts are numbered without a gap, and none began after the end. Of the clients: every accepted
question is in the record, was told its end, and has, to the last byte, the text that it has when nothing is killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.chaoslab.asking import Question, Told
from bench.chaoslab.lab import Target
from bench.chaoslab.record import OPEN_STATES, Record

TERMINAL_KINDS = ("vetoed", "completed", "failed", "cancelled", "expired", "dead")
#: What the row says after a terminal event that it has no state of its own for.
STATE_OF = {"vetoed": "failed"}
MOST_EXAMPLES = 5
RULES = (
    "lost",
    "without_one_terminal_event",
    "without_received_and_admitted",
    "row_disagrees",
    "attempts_out_of_order",
    "ran_after_the_end",
    "streams_unended",
    "unanswered",
    "texts_differ",
    "clients_misled",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many requests break each rule, by the rule's name, and some of them in words."""

    broken: Mapping[str, int]
    examples: Sequence[str]

    def targets(self) -> dict[str, Target]:
        """Return that none may be broken."""
        return dict.fromkeys(self.broken, ("<=", 0.0))


def judge(record: Record, told: Iterable[Told], calm: Mapping[Question, str]) -> Verdict:
    """Judge by both. `calm` has the text of each question's answer when nothing is killed."""
    broken: Counter[str] = Counter(dict.fromkeys(RULES, 0))
    examples: list[str] = []
    for rule, who, why in [*_of_the_record(record), *_of_the_clients(record, told, calm)]:
        broken[rule] += 1
        if broken[rule] <= MOST_EXAMPLES:
            examples.append(f"{rule}: {who} {why}")
    return Verdict(broken, examples)


#: A rule, the request that breaks it, and how.
_Broken = tuple[str, str | None, str]


def _of_the_record(record: Record) -> Iterator[_Broken]:
    for request_id in record.rows:
        yield from _of_a_request(record, request_id)
    for request_id in record.events.keys() - record.rows.keys():
        # Refused, and recorded as that; it never had a row.
        kinds = sorted(event.kind for event in record.events[request_id])
        if kinds not in (["failed", "received"], ["received", "vetoed"]):
            yield "without_one_terminal_event", request_id, f"has no row, and {kinds}"


def _of_a_request(record: Record, request_id: str) -> Iterator[_Broken]:
    row, events = record.rows[request_id], record.events[request_id]
    kinds = Counter(event.kind for event in events)
    ends = [event for event in events if event.kind in TERMINAL_KINDS]
    if row.state in OPEN_STATES:
        yield "lost", request_id, f"is {row.state} for ever, after {[event.kind for event in events]}"
        return
    if len(ends) != 1:
        yield "without_one_terminal_event", request_id, f"has {[event.kind for event in ends]}"
        return
    [end] = ends
    if (kinds["received"], kinds["admitted"]) != (1, 1):
        yield "without_received_and_admitted", request_id, f"has {dict(kinds)}"
    if (STATE_OF.get(end.kind, end.kind), end.attempt, True) != (row.state, row.attempt, row.finished):
        yield "row_disagrees", request_id, f"is {row}, and ended {end.kind} in attempt {end.attempt}"
    starts = record.starts(request_id)
    if [event.attempt for event in starts] != list(range(1, row.attempt + 1)):
        yield "attempts_out_of_order", request_id, f"has {[event.attempt for event in starts]}, the row {row.attempt}"
    if any(event.at > end.at for event in starts):
        yield "ran_after_the_end", request_id, "began an attempt after its terminal event"


def _of_the_clients(record: Record, told: Iterable[Told], calm: Mapping[Question, str]) -> Iterator[_Broken]:
    for one in told:
        if one.faults:
            yield "clients_misled", one.request_id, "; ".join(one.faults[:3])
        if one.request_id is None:
            continue
        row = record.rows.get(one.request_id)
        if row is None:
            yield "lost", one.request_id, "was accepted and has no row"
        elif one.event != row.state:
            yield "streams_unended", one.request_id, f"is {row.state}; its client was told {one.event} at {one.cursor}"
        elif one.event != "completed":
            yield "unanswered", one.request_id, f"ended {one.event} with {one.code}"
        elif one.text != calm[one.question]:
            texts = len(one.text), len(calm[one.question])
            yield "texts_differ", one.request_id, "has a text of {} characters, not the calm one of {}".format(*texts)
