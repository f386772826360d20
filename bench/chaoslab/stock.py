"""The control: the stock Redis transport of Celery, with late acknowledgement, under as many kills per message.

kombu pops a message and writes afterwards, in another command, that it is unacknowledged. A worker killed between the two
has lost it. After each kill nothing moves, so that it can be counted at once: what was published, and is neither done,
nor in the queue, nor unacknowledged, exists nowhere any more. The control must lose, or the kills of the scenario
`workers` prove nothing. One worker is killed at a time, as often per message as there, at a random point of its progress;
its tasks do next to nothing, which is when a worker pops most often. Each worker is forked from a process that has Celery
loaded, so that hundreds of them take a minute.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import redis

from bench.chaoslab import workers
from bench.chaoslab.lab import Lab, Outcome
from bench.chaoslab.services import DurableRedis
from bench.chaoslab.stock_app import DONE, QUEUE, TASK, app, work
from tests.services import wait_until

START_S = 60.0
UNACKNOWLEDGED = "unacked"


@dataclass(frozen=True, slots=True)
class Losses:
    """How many messages were published, how many workers killed, and how many messages lost by that."""

    messages: int
    kills: int
    lost: int


def run(lab: Lab) -> Outcome:
    """Run it."""
    losses = lose(lab, kills=lab.count(workers.KILLS), a_kill=workers.REQUESTS // workers.KILLS)
    figures = {
        "messages": float(losses.messages),
        "kills": float(losses.kills),
        "lost": float(losses.lost),
        "lost_per_kill": losses.lost / losses.kills,
    }
    return Outcome(figures, {"lost": (">=", 1.0)})


def lose(lab: Lab, *, kills: int, a_kill: int, enough: int | None = None) -> Losses:
    """Kill a stock worker so often, with `a_kill` messages published before each; stop once `enough` are lost."""
    rng = lab.rng("stock")
    server = DurableRedis("everysec")
    server.start()
    client = redis.Redis.from_url(server.url)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([work.__module__, "celery.apps.worker"])
    published = lost = done = 0
    try:
        while done < kills and (enough is None or lost < enough):
            _publish(server.url, range(published, published + a_kill))
            published += a_kill
            worker = forks.Process(target=work, args=(server.url,), daemon=True)
            worker.start()
            try:
                _wait_for_progress(client, worker, rng.randrange(1, a_kill))
            finally:
                worker.kill()
                worker.join()
            done += 1
            lost = published - len(_known(client))
            if done % 10 == 0:
                lab.say(f"  {done} of {kills} kills, {published:,} published, {lost} lost")
    finally:
        client.close()
        server.close()
    return Losses(published, done, lost)


def _publish(url: str, numbers: range) -> None:
    with app.connection_for_write(url) as connection, app.amqp.Producer(connection) as producer:
        for number in numbers:
            app.send_task(TASK, (number,), task_id=str(number), producer=producer)


def _wait_for_progress(client: redis.Redis, worker: BaseProcess, taken: int) -> None:
    """Wait until so many messages were popped since the worker's start, or all, or it has ended."""
    left = max(0, client.llen(QUEUE) - taken)
    wait_until(
        lambda: client.llen(QUEUE) <= left or not worker.is_alive(), START_S, "a stock worker that takes messages"
    )


def _known(client: redis.Redis) -> set[int]:
    """Return which messages still are somewhere, or have run."""
    waiting = [json.loads(raw) for raw in client.lrange(QUEUE, 0, -1)]
    held: list[Any] = [json.loads(raw)[0] for raw in client.hvals(UNACKNOWLEDGED)]
    done = {int(number) for number in client.smembers(DONE)}
    return done | {int(message["headers"]["id"]) for message in [*waiting, *held]}
