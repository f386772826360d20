"""Where Celery ends and the housekeeper begins: a bootstep that runs it as long as the worker lives.

Celery gives it what operators know from every other worker: start and stop, remote control, a name in Flower. The one
task has everything looked at now: `celery -A gateway_app.housekeeping call metaqore.housekeeping.sweep`.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Any

import redis
from celery import bootsteps, current_app, shared_task
from celery.signals import celeryd_init

from gateway_app.housekeeping.ending import Endings
from gateway_app.housekeeping.housekeeper import Housekeeper
from gateway_app.housekeeping.leadership import Leadership
from gateway_app.housekeeping.losses import Losses
from gateway_app.housekeeping.mark import Mark
from gateway_app.housekeeping.pins import PinnedProfiles
from gateway_app.profiles.wishes import Wishes
from tasks import tracing
from tasks.crypto import KeyWrapper, Signer
from tasks.db import Database
from tasks.errors import ConfigurationError
from tasks.logs import get_logger
from tasks.metrics.making import told_by
from tasks.metrics.own import Own
from tasks.metrics.serving import serve
from tasks.queueing.connecting import connect
from tasks.queueing.keys import QueueKeys
from tasks.queueing.leases import renewal_s
from tasks.queueing.message import MessageCodec
from tasks.queueing.publisher import Publisher
from tasks.settings import Settings, settings

#: sysexits' EX_CONFIG: starting again will not help.
EXIT_CONFIGURATION = 78
SWEEP = "metaqore.housekeeping.sweep"
#: Renewals of a lease that must fail to come before a running request counts as lost.
RENEWALS = 3
logger = get_logger(__name__)


def make(options: Settings, closing: ExitStack) -> Housekeeper:
    """Return a housekeeper of the configured gateway, not started, and serve its metrics. `closing` ends both.

    Raises ConfigurationError.
    """
    closing.callback(tracing.start(options.tracing, "metaqore-housekeeper"))
    database = Database(options.database)
    closing.callback(database.close)
    client = _connect(options)
    closing.callback(client.close)
    prefix = options.gateway.key_prefix
    codec = MessageCodec(Signer(options.secrets.keys("signing_key")), KeyWrapper(options.secrets.keys("master_key")))
    publisher = Publisher(client, QueueKeys(prefix))
    losses = Losses(
        database,
        publisher,
        codec,
        max_publications=options.scheduling.max_publications,
        patience_s=RENEWALS * renewal_s(options.scheduling.lease_s),
    )
    pins = PinnedProfiles(database, Wishes(client, QueueKeys(prefix)))
    made = Housekeeper(
        database, Leadership(client, prefix), Mark(client, prefix), losses, Endings(database, publisher), pins
    )
    registry = told_by("housekeeper", Own("housekeeper", database, client))
    closing.callback(serve(registry, options.metrics.host, options.metrics.housekeeper_port, made.wrong))
    return made


class HousekeeperStep(bootsteps.StartStopStep):
    """Starts the housekeeper with the worker, and ends it with the worker."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._closing = ExitStack()

    def start(self, _worker: Any) -> None:
        """Start the thread."""
        try:
            housekeeper = make(settings(), self._closing)
        except ConfigurationError as error:
            logger.critical("the housekeeper cannot start", detail=error.detail, hint=error.hint)
            raise SystemExit(EXIT_CONFIGURATION) from None
        housekeeper.start()
        self._closing.callback(housekeeper.close)

    def stop(self, _worker: Any) -> None:
        """End the thread, then its connections."""
        self._closing.close()

    def terminate(self, worker: Any) -> None:
        """End as `stop` does: there is nothing to lose by it."""
        self.stop(worker)


@celeryd_init.connect
def _name(instance: Any, **_signal: Any) -> None:
    """Give the worker a name of its own: a GPU worker on the same host has Celery's usual one."""
    name, _, host = instance.hostname.partition("@")
    if name == "celery":
        instance.hostname = f"housekeeping@{host or socket.gethostname()}"


@shared_task(name=SWEEP)
def sweep() -> None:
    """Have the leader look at all open requests at once."""
    with _connect(settings()) as client:
        Mark(client, settings().gateway.key_prefix).remove()


def _connect(options: Settings) -> redis.Redis:
    return connect(options.gateway.request_queue_url, options.gateway.redis_timeout_s, connections=2)


current_app.steps["worker"].add(HousekeeperStep)
