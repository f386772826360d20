"""Waiting until the gateway can do work, showing what it still waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway_app.local.client import Client
from gateway_app.local.progress import Progress

POLL_S = 0.2


def wait_until_ready(
    client: Client, progress: Progress, timeout_s: float, given_up: Callable[[], bool] = lambda: False
) -> list[str]:
    """Return once nothing is missing, or what is still missing after `timeout_s` seconds or once it is `given_up`."""
    began = time.monotonic()
    while (missing := client.missing()) and time.monotonic() - began < timeout_s and not given_up():
        progress.wait(", ".join(missing), time.monotonic() - began)
        time.sleep(POLL_S)
    progress.clear()
    return missing
