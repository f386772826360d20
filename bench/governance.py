"""What asking MetaQore adds to a request: with a warm cache, and at worst, when the server hangs.

Two gateways in this process, alike but for METAQORE_URL, share a real Redis and have a real SQLite database each. They
take the same tasks in turn, so that what else the machine does falls on both. The stand-in for MetaQore, which
answers over real HTTP, runs in a process of its own; with the default settings the gateway asks it anew every 5 s, and
those requests are in the figures, too. Then the stand-in hangs, and many threads ask for projects of their own.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient

from bench.report import arguments, finish
from gateway_app import build
from gateway_app.governance.api_keys import ApiKeys
from tasks.db import Database
from tasks.governance.metaqore.projects import LiveProjects
from tasks.migrating import upgrade
from tasks.settings import SECRET_NAMES, MetaqoreGroup, Settings
from tests.metaqore_stand_in import StandIn, artifact, conflict, project_id
from tests.services import RedisServer
from tests.tiny_model import make_tiny_model

AGENT = "incident-responder"
PROJECTS = 5
ARTIFACTS = 40
#: Beside the one that blocks an artifact: two pages of them.
CONFLICTS = 120
HANG_S = 1.0
WARM_UP = 50


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="through each gateway; default: %(default)s")
    parser.add_argument("--threads", type=int, default=50, help="while the server hangs; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as closing:
        stand_in = closing.enter_context(_stand_in("strict"))
        folder = Path(name)
        redis = RedisServer()
        closing.callback(redis.close)
        redis.start()
        model = make_tiny_model(folder / "model")
        clients = [
            closing.enter_context(_gateway(folder / side, redis.url, model, url))
            for side, url in (("without", None), ("with", stand_in))
        ]
        figures = _admission(clients, options.requests, random.Random(options.seed))
        figures |= _warm(stand_in)
        figures |= _hanging(closing.enter_context(_stand_in("hang")), options.threads)
    finish(
        "governance",
        options,
        figures,
        {
            "added_p50_ms": ("<=", 1.0),
            # What is left over is for threads to be woken on a machine with as few processors.
            "hanging_block_over_timeout_ms": ("<=", 100.0),
        },
    )


def _admission(clients: list[FlaskClient], count: int, chance: random.Random) -> dict[str, float]:
    """Send the same tasks to both gateways in turn; return the percentiles of each and of what is added, in ms."""
    taken: list[list[float]] = [[], []]
    for number in range(count + WARM_UP):
        body = {
            "agent": AGENT,
            "directive": f"Look at alert {number}.",
            "context": {"host": f"db-{chance.randrange(100)}", "alert": "disk full"},
            "project_id": project_id(chance.randrange(1, PROJECTS + 1)),
            "artifact_id": f"art_{chance.randrange(ARTIFACTS):012x}",
        }
        order = [0, 1] if chance.random() < 0.5 else [1, 0]
        for side in order:
            began = time.perf_counter()
            answer = clients[side].post("/v1/tasks", json=body)
            elapsed = time.perf_counter() - began
            if answer.status_code != 202:
                raise SystemExit(f"a task was refused: {answer.json}")
            if number >= WARM_UP:
                taken[side].append(elapsed * 1000)
    without, asked = map(_percentiles, taken)
    return {
        "requests": float(count),
        **{f"without_{name}_ms": value for name, value in without.items()},
        **{f"with_{name}_ms": value for name, value in asked.items()},
        **{f"added_{name}_ms": asked[name] - without[name] for name in without},
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def _warm(url: str) -> dict[str, float]:
    """Return what the question itself takes of a thread: from the cache, and through HTTP, in ms."""
    figures: dict[str, float] = {}
    for name, cache_s in (("cached", 60.0), ("asked", 0.0)):
        projects = LiveProjects(MetaqoreGroup(url=url, cache_s=cache_s), None)
        taken = [_ask(projects, 1) * 1000 for _ in range(WARM_UP + 300)][WARM_UP:]
        projects.close()
        figures |= {f"{name}_{percentile}_ms": value for percentile, value in _percentiles(taken).items()}
    return figures


def _hanging(url: str, threads: int) -> dict[str, float]:
    """Return the longest that anybody was held up, in ms, in several rounds of many threads at once."""
    projects = LiveProjects(MetaqoreGroup(url=url, timeout_s=HANG_S, breaker_failures=10**6), None)
    with ThreadPoolExecutor(threads) as pool:
        held = [
            seconds
            for turn in range(3)
            for seconds in pool.map(lambda number: _ask(projects, number), range(turn * threads, (turn + 1) * threads))
        ]
    projects.close()
    return {
        "hanging_threads": float(threads),
        "hanging_timeout_ms": HANG_S * 1000,
        "hanging_longest_block_ms": max(held) * 1000,
        "hanging_block_over_timeout_ms": max(0.0, (max(held) - HANG_S) * 1000),
    }


def _ask(projects: LiveProjects, number: int) -> float:
    """Return how long one question took, in seconds."""
    began = time.perf_counter()
    projects.standing(project_id=project_id(number), artifact_id="art_0", task_id=None, agent_name=AGENT)
    return time.perf_counter() - began


@contextmanager
def _gateway(folder: Path, redis_url: str, model: Path, metaqore_url: str | None) -> Iterator[FlaskClient]:
    """Make a gateway that asks MetaQore at the URL, or none."""
    folder.mkdir()
    secrets = dict.fromkeys(SECRET_NAMES, "ab" * 32)
    groups: dict[str, Any] = {
        "gateway": {"request_queue_url": redis_url, "key_prefix": f"{folder.name}:"},
        "database": {"url": f"sqlite:///{folder / 'gateway.db'}"},
        "engine": {"kind": "simulated", "model": str(model), "max_model_len": 8192},
        "metaqore": {"url": metaqore_url},
        "secrets": secrets,
    }
    settings = Settings(**groups)
    upgrade(settings.database.url)
    database = Database(settings.database)
    key = ApiKeys(database, settings.secrets.keys("key_pepper")).create("default", "bench")[1]
    database.close()
    app = build(settings)
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    with app.extensions["closing"]:
        yield client


@contextmanager
def _stand_in(how: str) -> Iterator[str]:
    """Run a stand-in in a process of its own; yield its URL."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(sender, how), daemon=True)
    process.start()
    try:
        yield receiver.recv()
    finally:
        process.terminate()
        process.join()


def _serve(sender: Any, how: str) -> None:
    stand_in = StandIn()
    for number in range(1, PROJECTS + 1):
        found = conflict(number, "medium")
        items = [artifact(item, project_id(number)) for item in range(ARTIFACTS)]
        stand_in.conflicts[project_id(number)] = [conflict(1000 + one, "low") for one in range(CONFLICTS)]
        stand_in.add(number, "in_progress", artifact(ARTIFACTS, project_id(number), conflicts=(found,)), *items)
    stand_in.fail("hang" if how == "hang" else None)
    sender.send(stand_in.url)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
