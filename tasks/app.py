"""Celery's configuration, for every way of starting it.

The settings are the ones that were found to hold up: acknowledge late, reserve one message at a time, never give up
on the broker, JSON only. `worker_pool` is threads because vLLM cannot run in prefork's daemonic children; the pool
itself runs nothing, the engine batches (see `worker_gpu.consumer`).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from celery import Celery
from kombu import Exchange, Queue

from tasks import flower
from tasks.errors import ConfigurationError
from tasks.logs import workers as _logging  # noqa: F401  importing it has Celery's processes log as all others do
from tasks.queueing import transport
from tasks.queueing.address import Address, parse
from tasks.queueing.connecting import CONNECT_TIMEOUT_S
from tasks.queueing.keys import FAMILY
from tasks.settings import settings


def configuration() -> dict[str, Any]:
    """Return Celery's settings. A configuration that cannot work ends the process with one clear message."""
    try:
        options = settings()
    except ConfigurationError as error:
        raise SystemExit(f"error: {error.detail}\nhint: {error.hint}") from None
    transport.register()
    if flower.is_starting():
        flower.prepare(options)
    address = parse(options.gateway.request_queue_url)
    queue = Queue(FAMILY, Exchange(FAMILY, type="topic"), routing_key=f"{FAMILY}.#")
    return {
        **_broker(address),
        "broker_transport_options": {
            **_sentinel(address),
            "global_keyprefix": options.gateway.key_prefix,
            "lease_s": options.scheduling.lease_s,
            "strategy": options.scheduling.strategy,
            "unacked_restore_interval": min(5.0, options.scheduling.lease_s / 4),
            "unacked_restore_throttle": 1,
            "socket_timeout": options.gateway.redis_timeout_s,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
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
        "worker_consumer": "tasks.queueing.reconnecting:Consumer",
        "worker_pool": "threads",
        "worker_concurrency": options.engine.max_num_seqs,
        "worker_prefetch_multiplier": 1,
        "worker_hijack_root_logger": True,
        "worker_send_task_events": options.flower.events,
        "task_send_sent_event": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def _broker(address: Address) -> dict[str, Any]:
    """Return where Celery finds the broker. Kombu separates several servers by semicolons, and takes TLS apart."""
    alias = transport.ALIAS if address.master_name is None else transport.SENTINEL_ALIAS
    user, password = (quote(text or "", safe="") for text in (address.username, address.password))
    login = f"{user}:{password}@" if user or password else ""
    # An IPv6 address is in brackets, as in any URL.
    hosts = [(f"[{host}]" if ":" in host else host, port) for host, port in address.hosts]
    urls = [f"{alias}://{login}{host}:{port}/{address.db}" for host, port in hosts]
    return {"broker_url": ";".join(urls), "broker_use_ssl": address.tls}


def _sentinel(address: Address) -> dict[str, Any]:
    if address.master_name is None:
        return {}
    asked_with = {"password": address.sentinel_password, "socket_timeout": CONNECT_TIMEOUT_S}
    return {"master_name": address.master_name, "sentinel_kwargs": asked_with}


def make_app() -> Celery:
    """Return the Celery application."""
    app = Celery("metaqore")
    app.config_from_object(configuration())
    return app
