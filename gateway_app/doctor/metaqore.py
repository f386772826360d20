"""The MetaQore server, where one is configured."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from gateway_app.doctor.finding import Finding, fail, ok
from tasks.errors import ConfigurationError
from tasks.settings import Settings

#: What to do about each way in which it does not answer; anything else is for its own log.
REMEDIES = {
    "unauthorized": "put its API key into the secret metaqore_api_key",
    "unreachable": "start it, or correct METAQORE_URL",
}


def examine(settings: Settings) -> Iterator[Finding]:
    """Ask it for its mode, as a gateway does."""
    if settings.metaqore.url is None:
        yield ok("metaqore", "none is configured")
        return
    try:
        key = settings.secrets.metaqore_key()
    except ConfigurationError as error:
        yield fail("metaqore", error.detail, "correct the secret")
        return
    yield asyncio.run(_asked(settings, key))


async def _asked(settings: Settings, key: str | None) -> Finding:
    # The HTTP client takes a while to import, and most installations need none.
    from tasks.governance.metaqore.client import Client

    # With a mode in the settings nothing would be asked.
    client = Client(settings.metaqore.model_copy(update={"mode": None}), key)
    try:
        snapshot = await client.snapshot(None)
    finally:
        await client.close()
    if snapshot.failure is None:
        return ok("metaqore", f"it answers; its mode is {snapshot.mode}")
    return fail(
        "metaqore",
        f"asking {settings.metaqore.url} failed: {snapshot.failure}; requests of projects are held or refused",
        REMEDIES.get(snapshot.failure, "look at its log"),
    )
