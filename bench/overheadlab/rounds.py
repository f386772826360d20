"""Every system in turn, round after round, so that what else the machine does slows all of them alike.

A cell is one system under one load. Its processor time is read before the first request and a moment after the last
answer, since what is left to do then belongs to the requests too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from bench.overheadlab.client import Cell, Client, Outcome
from bench.overheadlab.system import ANSWER_TOKENS, PATH, System
from bench.overheadlab.usage import cpu_s
from bench.overheadlab.wire import post

#: What is left to do after an answer: the lease is dropped, the access log written, memory given back.
SETTLE_S = 0.3
QUESTION = "Task {number:08d}: db-1 has 3 % of its disk left. Name the first thing to check, and the command for it."
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of each system: plain answers or streams, by so many clients, or at a rate a second.

    `tokens` is how long an answer is, if the system does not say the same each time.
    """

    name: str
    stream: bool
    clients: int
    rate: float | None = None
    tokens: int = ANSWER_TOKENS


@dataclass(frozen=True, slots=True)
class Sample:
    """What one cell showed. Processor time is in milliseconds a request, by part; latencies are in milliseconds.

    `first_ms` is the median until the first words, `chunks` the mean number of events with text.
    """

    requests: int
    per_s: float
    cpu_ms: Mapping[str, float]
    p50_ms: float
    p99_ms: float
    first_ms: float
    chunks: float


@dataclass(slots=True)
class Rounds:
    """Runs cells and keeps what they showed, by system and load, and `beside` each what the model alone showed then.

    `answered` counts each system's answers; `idle` has what systems use while nobody asks. Errors are kept as they are: with one the result is no measurement.
    """

    client: Client
    requests: int
    seconds: float
    seed: int
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    beside: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def run(self, direct: System, systems: Sequence[System], loads: Sequence[Load], rounds: int) -> Iterator[str]:
        """Put every load on every system and on the model alone, `rounds` times; say what is being done."""
        for number in range(1, rounds + 1):
            for load in loads:
                yield f"round {number} of {rounds}: {load.name}"
                alone = self.keep(direct, load)
                for system in systems:
                    self.keep(system, load, alone)

    def keep(self, system: System, load: Load, alone: Sample | None = None) -> Sample | None:
        """Run a cell and keep what it showed, beside what the model `alone` did; there is nothing if none was answered."""
        sample = self.cell(system, load)
        if sample is not None:
            key = (system.name, load.name)
            self.samples.setdefault(key, []).append(sample)
            if alone is not None:
                self.beside.setdefault(key, []).append(alone)
        return sample

    def cell(self, system: System, load: Load, requests: int | None = None) -> Sample | None:
        """Put a load on a system; return what it showed, or None if nothing was answered."""
        used = cpu_s(system.parts)
        spent: dict[str, float] = {}

        def finished() -> None:
            time.sleep(SETTLE_S)
            spent.update({part: seconds - used[part] for part, seconds in cpu_s(system.parts).items()})

        made = questions(system, load, self.requests if requests is None else requests)
        cell = Cell(system.port, made, load.stream, load.clients, self.seconds, load.rate, self.seed)
        outcome = self.client.run(cell, finished)
        self.answered[system.name] = self.answered.get(system.name, 0) + len(outcome.said)
        self.errors += [
            f"{system.name}, {load.name}: {error}" for error in (*outcome.errors, *wrong(system, load, outcome))
        ]
        return _sample(outcome, spent) if outcome.said else None


def questions(system: System, load: Load, number: int) -> tuple[bytes, ...]:
    """Return so many requests, no two alike."""
    host = f"127.0.0.1:{system.port}"
    asked = (QUESTION.format(number=next(_numbers)) for _ in range(number))
    bodies = (system.body(text, stream=load.stream, tokens=load.tokens) for text in asked)
    return tuple(post(host, PATH, system.headers, body) for body in bodies)


def wrong(system: System, load: Load, outcome: Outcome) -> list[str]:
    """Return what is wrong with answers: each has an id of its own, all its words, and the end that belongs to them."""
    found = []
    if len({said.id for said in outcome.said}) < len(outcome.said):
        found.append("two answers have the same id")
    for said in outcome.said:
        right = said.text == system.answer if system.answer else len(said.text.split()) == load.tokens
        if not right or said.finish_reason not in ("stop", "length"):
            found.append(f"{said.finish_reason} after {said.text!r}")
    return found


def _sample(outcome: Outcome, spent: Mapping[str, float]) -> Sample:
    """Return what a cell showed."""
    number = len(outcome.said)
    return Sample(
        requests=number,
        per_s=number / outcome.elapsed_s,
        cpu_ms={part: seconds * 1000 / number for part, seconds in spent.items()},
        p50_ms=quantile(outcome.whole_s, 0.5) * 1000,
        p99_ms=quantile(outcome.whole_s, 0.99) * 1000,
        first_ms=quantile(outcome.first_s, 0.5) * 1000,
        chunks=sum(said.chunks for said in outcome.said) / number,
    )


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value that `part` of all do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]
