"""Waiting until the gateway can do work, showing what it still waits for."""

from __future__ import annotations

import time

from gateway_app.local.client import Client
from gateway_app.local.progress import Progress

POLL_S = 0.2


def wait_until_ready(client: Client, progress: Progress, timeout_s: float = float("inf")) -> list[str]:
    """Return once nothing is missing, or what is still missing after `timeout_s` seconds."""
    began = time.monotonic()
    while (missing := client.missing()) and time.monotonic() - began < timeout_s:
        progress.wait(", ".join(missing), time.monotonic() - began)
        time.sleep(POLL_S)
    progress.clear()
    return missing
