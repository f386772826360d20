"""A rolling upgrade with a change of the schema, under load, and the way back: nothing is lost, doubled or refused.

The release before runs from its own wheel. The database is migrated by today's `flask db upgrade` while it serves; then its
processes are replaced by today's one by one, and today's by its again, so that each role meets the other release on either
side. The schema stays as it is on the way back. What is queued by one release is run by the other, in both directions.

`UPGRADE_DATABASE=sqlite` and `UPGRADE_ORDER=workers_first` run it otherwise; each run takes half a minute.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from bench.chaoslab.asking import Question
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.record import read
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.local.secrets import create_secrets
from tasks.db import Database
from tasks.settings import DatabaseGroup, SecretsGroup
from tests.services import RedisServer, wait_until
from tests.upgrade.migrations import with_migration
from tests.upgrade.mixed_fleet import SOON_S, MixedFleet, Role, configuration
from tests.upgrade.other_clients import LINES, Caller, batch_answers, begin_batch
from tests.workers import ROOT

#: Answers of one to three seconds: most are longer than a gateway or a worker that ends waits for them.
ENGINE = '{"time_scale": 8}'
QUESTIONS = [Question(f"What now? {number}", max_tokens=20 + 30 * number, seed=number) for number in range(3)]
ORDERS: dict[str, tuple[Role, ...]] = {
    "workers_first": ("worker", "housekeeper", "gateway"),
    "gateways_first": ("gateway", "housekeeper", "worker"),
}
#: Questions that must be answered in each state of the fleet before the next process is replaced.
EACH = 3
MIGRATE = """
import sys
from pathlib import Path
from tasks import migrating
migrating.MIGRATIONS = Path(sys.argv[2])
migrating.upgrade(sys.argv[1])
"""


class Load:
    """Clients of all kinds, which ask until they are told that it is enough."""

    def __init__(self, urls: list[str], key: str) -> None:
        self.calm: dict[Question, str] = {}
        self.crowd = Crowd(urls, key, (QUESTIONS[n % len(QUESTIONS)] for n in itertools.count()), seed=1, at_once=6)
        self.callers = [Caller(urls, key, background=background) for background in (False, True)]
        self.batch_id = ""
        self._urls, self._key = urls, key

    def ask_in_calm(self) -> None:
        """Have each question answered once; these are the texts to compare with."""
        with Crowd(self._urls, self._key, iter(QUESTIONS), seed=1, at_once=len(QUESTIONS)) as crowd:
            wait_until(lambda: crowd.done, SOON_S, "the calm answers")
        assert [told.event for told in crowd.told] == ["completed"] * len(QUESTIONS), crowd.told
        self.calm = {told.question: told.text for told in crowd.told}

    def begin(self, stack: ExitStack) -> None:
        """Let everybody ask."""
        stack.callback(self.stop)
        stack.enter_context(self.crowd)
        self.batch_id = begin_batch(self.callers[0])
        for caller in self.callers:
            caller.start()

    def go_on(self) -> None:
        """Wait until so much more was asked and answered of each kind, or something went wrong."""
        before = [self.crowd.finished, *(caller.answered for caller in self.callers)]
        wanted = [EACH, 1, 1]

        def enough() -> bool:
            now = [self.crowd.finished, *(caller.answered for caller in self.callers)]
            return bool(self.wrong()) or all(a >= b + c for a, b, c in zip(now, before, wanted, strict=True))

        wait_until(enough, SOON_S, f"answers beyond {before}; {self.crowd.progress()}")

    def finish(self) -> None:
        """Have nothing more asked, and wait for what was asked, the batch too."""
        self.crowd.enough()
        self.stop()
        for caller in self.callers:
            caller.join(SOON_S)
        wait_until(lambda: self.crowd.done, SOON_S, "the last streams")
        assert batch_answers(self.callers[0], self.batch_id) == [200] * LINES

    def stop(self) -> None:
        """Have the callers ask nothing more."""
        for caller in self.callers:
            caller.enough.set()

    def wrong(self) -> list[str]:
        """Return what clients were told that they never should be; that a gateway is busy (503) they may be, for a while."""
        told = list(self.crowd.told)
        statuses = {status for one in told for status, _ in one.refusals} - {503}
        faults = [fault for one in told for fault in one.faults] + [f for caller in self.callers for f in caller.faults]
        return [*faults, *(f"a client was answered {status}" for status in sorted(statuses))]

    def longest_gap_s(self) -> float:
        """Return the longest time in which no question was accepted, once there were any."""
        times = sorted(one.accepted_at for one in self.crowd.told if one.accepted_at)
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


@pytest.fixture
def fleet(
    tmp_path: Path, own_redis: RedisServer, database_url: str, tiny_model: Path, old_release: Path
) -> Iterator[MixedFleet]:
    """Return a fleet of the release before, on its own schema, under no load yet."""
    create_secrets(tmp_path / "secrets")
    given = configuration(tmp_path, tiny_model, own_redis.url, database_url, ENGINE__OPTIONS=ENGINE)
    fleet = MixedFleet(tmp_path, given)
    fleet.python(old_release, "from tasks.migrating import upgrade; import sys; upgrade(sys.argv[1])", database_url)
    try:
        first = [fleet.start(role, old_release) for role in ORDERS["workers_first"]]
        fleet.wait_for(*first)
        for one in first:
            fleet.switch_to(one)
        yield fleet
    finally:
        fleet.kill()


@pytest.fixture
def make_load(fleet: MixedFleet, database_url: str, tmp_path: Path) -> Iterator[Callable[[], Load]]:
    """Return a function that has clients ask; the texts they should get are known."""
    database = Database(DatabaseGroup(url=database_url))
    key = ApiKeys(database, SecretsGroup(directory=tmp_path / "secrets").keys("key_pepper")).create("default", "up")[1]
    database.close()
    with ExitStack() as stack:

        def make() -> Load:
            load = Load(fleet.urls, key)
            load.ask_in_calm()
            load.begin(stack)
            load.go_on()
            return load

        yield make


MakeLoad = Callable[[], Load]


def migrate(fleet: MixedFleet) -> None:
    """Migrate while the release before serves."""
    assert "up to date" in fleet.flask(ROOT, "db", "upgrade")
    # docs/upgrading.md says what this release's gateways do that later ones do not.
    assert requests.get(f"{fleet.urls[0]}/readyz", timeout=30).status_code == 503


def judge_all(load: Load, database_url: str) -> None:
    """Every accepted request ended once, with the text it has in calm; every stream is complete; nobody heard an error."""
    load.finish()
    report(load)
    verdict = judge(read(database_url), load.crowd.told, load.calm)
    assert not any(verdict.broken.values()), verdict.examples
    assert load.wrong() == []
    for caller in load.callers:
        assert len(caller.texts) == 1, "the same question, asked of both releases, was answered differently"
    assert sum(told.resumed for told in load.crowd.told), "no gateway cut a stream off: this test showed nothing of it"


@pytest.mark.parametrize("database_kind", [os.environ.get("UPGRADE_DATABASE", "postgresql")], indirect=True)
def test_there_and_back(
    fleet: MixedFleet, make_load: MakeLoad, old_release: Path, database_url: str, tmp_path: Path
) -> None:
    """Replaced in one order, taken back in the same: so workers of each release run what gateways of the other queue.

    Then the control: a migration renames a column that the release before writes, and the same clients notice.
    """
    load = make_load()
    migrate(fleet)
    load.go_on()
    for release in (ROOT, old_release):
        for role in ORDERS[os.environ.get("UPGRADE_ORDER", "gateways_first")]:
            fleet.replace(role, release)
            load.go_on()
    judge_all(load, database_url)
    control = make_load()
    scripts = with_migration(tmp_path, "ALTER TABLE requests RENAME COLUMN excused TO pardoned")
    fleet.python(ROOT, MIGRATE, database_url, str(scripts))
    wait_until(control.wrong, SOON_S, "a client that hears an error")
    print(control.wrong()[0])


def report(load: Load) -> None:
    """Print what a person who runs this wants to know."""
    plain, background = (caller.answered for caller in load.callers)
    busy = sum(len(told.refusals) for told in load.crowd.told)
    print(
        f"{load.crowd.progress()}; {plain} plain, {background} in the background; 503 {busy} times;"
        f" longest time without an acceptance {load.longest_gap_s():.1f} s"
    )
