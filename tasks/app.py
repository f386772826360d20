"""Celery's configuration, for every way of starting it.

The settings are the ones that were found to hold up: acknowledge late, reserve one message at a time, never give up
on the broker, JSON only. `worker_pool` is threads because vLLM cannot run in prefork's daemonic children; the pool
itself runs nothing, the engine batches (see `worker_gpu.consumer`).
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from tasks.errors import ConfigurationError
from tasks.queueing import transport
from tasks.queueing.keys import FAMILY
from tasks.settings import settings


def configuration() -> dict[str, Any]:
    """Return Celery's settings. A configuration that cannot work ends the process with one clear message."""
    try:
        options = settings()
    except ConfigurationError as error:
        raise SystemExit(f"error: {error.detail}\nhint: {error.hint}") from None
    transport.register()
    scheme, _, rest = options.gateway.request_queue_url.partition("://")
    queue = Queue(FAMILY, Exchange(FAMILY, type="topic"), routing_key=f"{FAMILY}.#")
    return {
        "broker_url": f"{transport.ALIAS}://{rest}",
        "broker_use_ssl": {"ssl_cert_reqs": "required"} if scheme == "rediss" else None,
        "broker_transport_options": {
            "key_prefix": options.gateway.key_prefix,
            "lease_s": options.scheduling.lease_s,
            "unacked_restore_interval": min(5.0, options.scheduling.lease_s / 4),
            "unacked_restore_throttle": 1,
            "socket_timeout": options.gateway.redis_timeout_s,
            "socket_connect_timeout": 3.0,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "priority_steps": [0],
        },
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "imports": ("worker_gpu.consumer",),
        "task_queues": (queue,),
        "task_default_queue": FAMILY,
        "task_create_missing_queues": False,
        "task_acks_late": True,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "worker_pool": "threads",
        "worker_concurrency": options.engine.max_num_seqs,
        "worker_prefetch_multiplier": 1,
        "worker_hijack_root_logger": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def make_app() -> Celery:
    """Return the Celery application."""
    app = Celery("metaqore")
    app.config_from_object(configuration())
    return app
