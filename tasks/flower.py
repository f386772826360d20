"""What Flower, Celery's dashboard, is started with where its operator says nothing else.

It listens on loopback only and wants a password, it does not switch on the workers' events unless `flower.events` is set, and it
logs as every other process does. Its page about the broker asks our queue for its length: it would ask for that of one
Redis list, and the queue is many.

Flower's own options, environment variables and configuration file go first. So this is called with Celery's configuration, which
every way of starting Flower has in common, and sets what nobody else sets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis

from tasks import logs
from tasks.queueing.connecting import connect_async
from tasks.queueing.keys import FAMILY, QueueKeys
from tasks.settings import Settings, settings

USER = "flower"


def is_starting() -> bool:
    """Tell whether this process is a `celery … flower`."""
    return "flower" in sys.argv[1:]


def prepare(options: Settings) -> None:
    """Have Flower, which is about to be made in this process, start with these defaults."""
    import flower.app
    import flower.views
    from tornado.options import options as given

    logs.configure(options.logs)
    _default(given, "address", "127.0.0.1")
    _default(given, "enable_events", options.flower.events)
    flower.views.Broker = QueueLengths
    serve = flower.app.Flower.start_http_server

    def serve_closed(self: Any) -> Any:
        if not self.options.auth and not self.options.basic_auth:
            self.options.basic_auth = [f"{USER}:{_password(options)}"]
        return serve(self)

    # By then Flower has read whatever its operator says.
    flower.app.Flower.start_http_server = serve_closed


def _default(given: Any, name: str, value: object) -> None:
    """Set an option that nobody has set."""
    option = given._options[name.replace("_", "-")]  # noqa: SLF001  Flower looks there, too
    if option._value is option.UNSET:  # noqa: SLF001
        setattr(given, name, value)


def _password(options: Settings) -> str:
    """Return what Flower asks for. Ends the process with a message if there is nothing: it is never served to everybody."""
    password = options.secrets.flower_password_text()
    if password is None:
        raise SystemExit(
            f"error: Flower needs a password: {options.secrets.directory / 'flower_password'} does not exist\n"
            "hint: `flask secrets create` makes it; FLOWER_BASIC_AUTH=user:password names another."
        )
    return password


class QueueLengths:
    """What Flower's page about the broker asks, in the place of its own client; it is made anew for each look."""

    def __init__(self, *_url: object, **_options: object) -> None:
        gateway = settings().gateway
        self._client: Redis = connect_async(gateway.request_queue_url, gateway.redis_timeout_s)
        self._prefix = gateway.key_prefix

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return how many messages wait in each queue."""
        try:
            return [{"name": name, "messages": await self._length(name)} for name in names]
        finally:
            await self._client.aclose()

    async def _length(self, name: str) -> int:
        if name == FAMILY:
            return int(await self._client.hget(QueueKeys(self._prefix).named("counts"), "requests") or 0)
        return int(await self._client.llen(self._prefix + name))
