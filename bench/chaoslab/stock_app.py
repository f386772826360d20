"""The control's Celery application: the stock Redis transport with late acknowledgement, and nothing of the gateway.

A task is as small as one can be: it notes in Redis that it has run.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import redis
from celery import Celery, Task
from celery.exceptions import SecurityWarning

QUEUE, DONE, TASK = "stock", "done", "stock.note"

app = Celery("stock")
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    task_default_queue=QUEUE,
    worker_prefetch_multiplier=1,
    # A worker whose Redis is gone ends, instead of waiting for it when the bench itself was killed.
    broker_connection_retry=False,
    broker_connection_retry_on_startup=False,
    # Far longer than the control runs: what is unacknowledged stays where it can be counted.
    broker_transport_options={"visibility_timeout": 3600},
)


@functools.cache
def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


@app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator]
def note(self: Task[Any, Any], number: int) -> None:
    """Note that the task has run."""
    _client(self.app.conf.broker_url).sadd(DONE, number)


def work(url: str) -> None:
    """Be a worker on the Redis at `url`, until the process is killed."""
    # Its advice not to run as root is for those who leave it running.
    warnings.simplefilter("ignore", SecurityWarning)
    app.conf.broker_url = url
    options = {"pool": "solo", "concurrency": 1, "quiet": True, "loglevel": "ERROR"}
    app.Worker(hostname="stock@chaos", without_gossip=True, without_mingle=True, **options).start()
