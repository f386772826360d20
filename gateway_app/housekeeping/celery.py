"""The application that `celery -A gateway_app.housekeeping worker -Q housekeeping` finds.

It is the GPU workers' configuration with another queue and other tasks. Its pool is this one process: what it runs is
a thread of the worker's own and a task that takes a millisecond.
"""

from __future__ import annotations

from celery import Celery
from kombu import Queue

from tasks.app import configuration

QUEUE = "housekeeping"

app = Celery("metaqore-housekeeping")
app.config_from_object(
    {
        **configuration(),
        "imports": ("gateway_app.housekeeping.worker",),
        "task_queues": (Queue(QUEUE),),
        "task_default_queue": QUEUE,
        "worker_pool": "solo",
        "worker_concurrency": 1,
    }
)
