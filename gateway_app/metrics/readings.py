"""What a gateway holds: streams, sockets, and how many there may be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from gateway_app.streaming.pump import Pump
from gateway_app.streaming.serving import OpenSockets
from tasks.metrics import gateway as metrics
from tasks.settings import Settings


class GatewayReadings:
    """Looks up what a gateway holds now."""

    def __init__(self, pump: Pump, sockets: OpenSockets, settings: Settings) -> None:
        self._pump, self._sockets, self._settings = pump, sockets, settings

    def describe(self) -> Iterable[Metric]:
        """Have nothing looked up before somebody asks."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Look everything up: nothing of it waits for anybody."""
        yield metrics.STREAMS.now(len(self._pump.streams))
        yield metrics.SOCKETS.now(self._sockets.count)
        yield metrics.SOCKETS_LIMIT.now(self._settings.streaming.max_sockets)
        yield metrics.THREADS.now(self._settings.gateway.threads)
