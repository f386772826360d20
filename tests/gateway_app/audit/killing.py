"""Kills followers with SIGKILL while events are written, and counts what the files hold at the end.

    python -m tests.gateway_app.audit.killing --kills 150 --database postgresql --seed 7

starts a database of its own, and does for long what a test does for a moment. Several writers commit at once, in any
order, and take some commits back; somebody else appends lines of his own to the files. `naive` ways to follow are here to
show that the count finds what they lose or write twice.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from gateway_app.audit import checkpoint, follow
from gateway_app.audit.follow import Follower
from gateway_app.audit.trail import EventName, name_in
from tasks.migrating import upgrade
from tests.gateway_app.audit.recording import add, engine_of, names, opened
from tests.services import PostgresServer

ORGANIZATIONS = ("acme", "other")
WRITERS = 3
#: How long a follower lives at most, in seconds.
LIFE_S = 0.12
FOREIGN = b'{"timestamp": "2026-01-05T10:00:00+00:00", "event_type": "alert", "organization": "acme", "payload": {}}\n'
#: So few that a follower is killed within a batch more often than between two.
BATCH = 20


@dataclass(frozen=True)
class Outcome:
    """What was found at the end: how many events there are, which the files lack, which they hold twice, and bad lines."""

    events: int
    kills: int
    missing: int
    repeated: int
    bad_lines: int
    foreign_lost: int

    @property
    def exact(self) -> bool:
        """Tell whether each event is there once, and all that others wrote."""
        return not (self.missing or self.repeated or self.bad_lines or self.foreign_lost)


def soak(url: str, folder: Path, kills: int, seed: int, way: str = "") -> Outcome:
    """Kill followers of the record at `url`, which has tables, `kills` times, and let the last one come to the end."""
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gateway_app.audit.follow", "tests.gateway_app.audit.recording"])
    stop = threading.Event()
    foreign = [0]
    threads = [threading.Thread(target=_write, args=(url, seed + number, stop)) for number in range(WRITERS)]
    threads.append(threading.Thread(target=_append, args=(folder, stop, foreign)))
    for thread in threads:
        thread.start()
    try:
        for _ in range(kills):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_follow, args=(url, str(folder), way, False, sender))
            process.start()
            receiver.recv()
            time.sleep(chance.random() * LIFE_S)
            process.kill()
            process.join()
            receiver.close()
            sender.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    receiver, sender = context.Pipe(duplex=False)
    last = context.Process(target=_follow, args=(url, str(folder), way, True, sender))
    last.start()
    last.join()
    if last.exitcode != 0:
        raise RuntimeError(f"the last follower ended with {last.exitcode}")
    return _count(url, folder, kills, foreign[0])


def _count(url: str, folder: Path, kills: int, foreign: int) -> Outcome:
    with opened(url) as database:
        wanted = Counter((name, whose) for whose in ORGANIZATIONS for name in names(database, whose))
    found: Counter[tuple[EventName, str]] = Counter()
    bad, others = 0, 0
    for whose in ORGANIZATIONS:
        path = folder / f"compliance_audit_{whose}.jsonl"
        # A naive follower can lose all that one organization ever had.
        for content in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            others += content == FOREIGN
            try:
                assert content.endswith(b"\n")
                assert isinstance(json.loads(content), dict)
            except (AssertionError, ValueError):
                bad += 1
            else:
                name = name_in(content)
                if name is not None:
                    found[name, whose] += 1
    return Outcome(
        events=wanted.total(),
        kills=kills,
        missing=(wanted - found).total(),
        repeated=(found - wanted).total(),
        bad_lines=bad,
        foreign_lost=foreign - others,
    )


def _follow(url: str, folder: str, way: str, once: bool, ready: Pipe) -> None:
    """Follow, in a process of its own, until it is killed; or, with `once`, what there is."""
    follow.BATCH = BATCH
    if way:
        NAIVE[way]()
    with checkpoint.locked(Path(folder)), opened(url) as database:
        follower = Follower(database, None, Path(folder), print)
        ready.send("ready")
        if once:
            follower.catch_up(threading.Event())
        else:
            follower.run(threading.Event(), 0.002)


def _write(url: str, seed: int, stop: threading.Event) -> None:
    """Record events in transactions that overlap with those of the other writers."""
    chance = random.Random(seed)
    with engine_of(url) as engine:
        writing = engine.execution_options(immediate=True)
        while not stop.is_set():
            with writing.begin() as connection:
                for _ in range(chance.randrange(1, 4)):
                    add(connection, chance.choice(ORGANIZATIONS), details={"psmp": {"padding": "x" * 1000}})
                if engine.dialect.name != "sqlite":
                    time.sleep(chance.random() * 0.02)
                if chance.random() < 0.1:
                    connection.rollback()
            time.sleep(chance.random() * 0.06)


def _append(folder: Path, stop: threading.Event, count: list[int]) -> None:
    """Write to a file as MetaQore does, who locks nothing."""
    path = folder / f"compliance_audit_{ORGANIZATIONS[0]}.jsonl"
    while not stop.wait(0.02):
        # Behind the beginning of a line that a killed follower left, it would be lost; that is not what is counted here.
        if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
            with path.open("ab") as file:
                file.write(FOREIGN)
            count[0] += 1


def _note_nothing() -> None:
    """Append, then note: what was appended before a kill is appended again.

    As in the other, the pause between the two makes it certain that a kill falls there, on machines of any speed.
    """
    keep = Follower._keep

    def careless(self: Follower, new: checkpoint.Checkpoint) -> None:
        if new.intent is None:
            time.sleep(LIFE_S)
        keep(self, new.model_copy(update={"intent": None}))

    Follower._keep = careless  # type: ignore[method-assign]


def _note_first() -> None:
    """Note that it is done, then append: what was not appended before a kill never is."""
    append = Follower._append

    def hasty(self: Follower, batch: follow.Batch, events: int) -> None:
        if batch:
            self._keep(self._checkpoint.done(max((name for each in batch.values() for name in each), key=str)))
            time.sleep(LIFE_S)
        append(self, batch, events)

    Follower._append = hasty  # type: ignore[method-assign]


NAIVE: dict[str, Callable[[], None]] = {"note nothing": _note_nothing, "note first": _note_first}


def main() -> None:
    """Run it by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--way", choices=sorted(NAIVE), default="", help="follow in a naive way instead")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="killing-"))
    server = PostgresServer() if options.database == "postgresql" else None
    try:
        if server is not None:
            server.start()
        url = server.url(server.create_database()) if server is not None else f"sqlite:///{folder / 'gateway.db'}"
        upgrade(url)
        (folder / "files").mkdir()
        outcome = soak(url, folder / "files", options.kills, options.seed, options.way)
        print(outcome)
    finally:
        if server is not None:
            server.close()
        shutil.rmtree(folder)
    raise SystemExit(0 if outcome.exact else 1)


if __name__ == "__main__":
    main()
