"""An engine that dies or hangs takes no request with it: its worker gives back what it ran and ends, and another answers."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from tasks.settings import settings
from tests.services import RedisServer
from tests.worker_gpu.site import site
from worker_gpu.engine_step import EXIT_ENGINE_DEAD

PACE = {"tokens_per_s_per_sequence": 40, "answer_tokens": 20}
STALL_S = 1.0
#: From the fault to the end of the process, on a machine that does other things as well.
LEFT_WITHIN_S = 15.0

pytestmark = [
    pytest.mark.usefixtures("configured"),
    pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True),
]


def test_another_worker_answers(tmp_path: Path) -> None:
    """Two workers, one of whose engines breaks in the middle of its work: it hangs, or runs out of memory."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    nth, what = choose.randrange(2, 5), choose.choice(["hang", "out_of_memory"])
    with site(tmp_path) as made:
        faulty = made.start(
            "faulty",
            options={**PACE, "faults": [{"what": what, "request": nth}]},
            ENGINE__MAX_NUM_SEQS="4",
            ENGINE__STALL_S=str(STALL_S),
            SCHEDULING__RETRY_FIRST_S="0.2",
        )
        made.wait_until_ready("faulty")
        ids = [made.submit(f"Question {number}") for number in range(8)]
        began = time.monotonic()
        made.start("sound", options=PACE)
        assert faulty.wait(60) == EXIT_ENGINE_DEAD
        print(f"left within {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < LEFT_WITHIN_S + STALL_S
        made.check_ends(ids)
        retried = [row for row in made.rows(*ids) if row.attempt > 1]
        assert retried
        for row in retried:
            assert (row.attempt, row.excused) == (2, 0)
            assert ("requeued", "engine_dead") in made.kinds(row.request_id)
        for request_id in ids:
            said, streamed = made.texts(request_id)
            assert said == streamed


def test_it_ends_in_bounded_time_without_its_services(
    own_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database and Redis hang as well when the engine does: nothing can be given back, and the leases end by themselves."""
    monkeypatch.setenv("REDIS_URL", own_redis.url)
    monkeypatch.setenv("METAQORE_GATEWAY__REDIS_TIMEOUT_S", "2")
    settings.cache_clear()
    pid = own_redis.pid
    assert pid is not None
    with site(tmp_path) as made:
        worker = made.start(
            "faulty",
            options={**PACE, "faults": [{"what": "hang", "request": 1}]},
            ENGINE__STALL_S=str(STALL_S),
            DATABASE__TIMEOUT_S="1",
        )
        made.wait_until_ready("faulty")
        request_id = made.submit("What now?")
        made.wait_for_states([request_id], "running")
        path = settings().database.url.removeprefix("sqlite:///")
        os.kill(pid, signal.SIGSTOP)
        try:
            holding = sqlite3.connect(path, isolation_level=None)
            holding.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            assert worker.wait(60) == EXIT_ENGINE_DEAD
            print(f"left within {time.monotonic() - began:.1f} s")
            assert time.monotonic() - began < LEFT_WITHIN_S + STALL_S
            holding.execute("ROLLBACK")
            holding.close()
        finally:
            os.kill(pid, signal.SIGCONT)
        # Nothing of it was given back: another worker takes it when its lease has ended.
        assert [kind for kind, _ in made.kinds(request_id)] == ["received", "admitted", "started"]
        assert made.redis.zcard(made.keys.named("leases")) == 1
