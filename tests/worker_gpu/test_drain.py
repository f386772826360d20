"""A worker that is told to end takes nothing more, ends what it can, and hands back the rest. Nothing is lost, told twice
or held against a request.
"""

from __future__ import annotations

import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.services import wait_until
from tests.worker_gpu.site import Site, site

DRAIN_S = 2.0
#: An answer takes three seconds, longer than a drain waits, unless it is asked for half of it.
OPTIONS = {"tokens_per_s_per_sequence": 20, "answer_tokens": 60}
SHORT = ["Be short.", "And you."]
TEXTS = [f"Question {number}" for number in range(8)]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest.mark.usefixtures("configured")
def test_workers_end_under_load(tmp_path: Path) -> None:
    """One by SIGTERM, one by SIGTERM twice, one by SIGQUIT, each in the middle of its work; the fourth ends it all."""
    ends = {
        "term": (signal.SIGTERM,),
        "twice": (signal.SIGTERM, signal.SIGTERM),
        "quit": (signal.SIGQUIT,),
    }
    with site(tmp_path) as made:
        ids = [made.submit(text, max_tokens=15) for text in SHORT] + [made.submit(text) for text in TEXTS]
        for name, signals in ends.items():
            worker = made.start(name, options=OPTIONS, SCHEDULING__DRAIN_S=str(DRAIN_S), ENGINE__MAX_NUM_SEQS="4")
            made.wait_until_ready(name)
            wait_until(partial(has_four_running, made, ids), 30, "four to run")
            began = time.monotonic()
            for number in signals:
                worker.send(number)
                if number == signal.SIGTERM:
                    wait_until(partial(is_draining, made, name), 10, "the heartbeat to say so")
            worker.wait()
            print(f"{name}: ended after {time.monotonic() - began:.1f} s")
            assert time.monotonic() - began < DRAIN_S + 15
            assert made.redis.zcard(made.keys.named("leases")) == 0
            if name == "term":
                # What could end in the grace time has, and nothing was taken in its place.
                done, ids = ids[: len(SHORT)], ids[len(SHORT) :]
                assert [(row.state, row.attempt) for row in made.rows(*done)] == [("completed", 1)] * len(SHORT)
            assert {row.state for row in made.rows(*ids)} == {"queued"}
            assert all(row.attempt == row.excused for row in made.rows(*ids))
        made.start("last", options={"time_scale": 0})
        made.check_ends(ids)
        for row in made.rows(*ids):
            assert row.attempt == row.excused + 1
            codes = {code for kind, code in made.kinds(row.request_id) if kind == "requeued"}
            assert codes <= {"worker_draining"}
        assert sum(row.excused for row in made.rows(*ids)) == 2 + 4 + 4
        # What each says is what the same question gets in peace.
        twins = [made.submit(text) for text in TEXTS]
        made.check_ends(twins)
        for request_id, twin in zip(ids, twins, strict=True):
            said, streamed = made.texts(request_id)
            assert said == streamed == made.texts(twin)[0]
        assert "Traceback" not in made.log


def has_four_running(made: Site, ids: list[str]) -> bool:
    """Tell whether as many run as the worker takes."""
    return bool(sum(row.state == "running" for row in made.rows(*ids)) == 4)


def is_draining(made: Site, name: str) -> bool:
    """Tell whether a worker says that it takes nothing more."""
    return bool(made.states().get(name) == "draining")
