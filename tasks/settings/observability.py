"""Settings of observability: what the processes tell about themselves in logs, metrics and traces, and to Flower."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.settings.environment import trace_exporters
from tasks.settings.group import Group


class LogsGroup(Group):
    """What the processes say, one event a line. See [logs.md](logs.md)."""

    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`console` is text for a person; `auto`: on a terminal `console`, elsewhere `json`."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="The least that is shown. Celery's `--loglevel` and gunicorn's `--log-level` go first.",
    )
    access: bool = Field(default=True, description="A line for each HTTP request, on standard output.")
    core_dumps: bool = Field(
        default=False, description="Let the kernel write core dumps, in which prompts are, of processes that crash."
    )


class FlowerGroup(Group):
    """Celery's dashboard. See [flower.md](flower.md)."""

    events: bool = Field(
        default=False, description="Workers tell of every task as it happens, and Flower has them do so."
    )


class MetricsGroup(Group):
    """Where Prometheus finds the metrics. See [metrics.md](metrics.md)."""

    gateway_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="A port of their own for a gateway's; default: /metrics on the gateway's port. 0: nowhere.",
    )
    worker_port: int = Field(
        default=9470,
        ge=0,
        le=65535,
        description="A worker's; where it is taken, the first free of the next nine. 0: none.",
    )
    housekeeper_port: int = Field(default=9480, ge=0, le=65535, description="The same for a housekeeper.")
    host: str = Field(default="127.0.0.1", description="The address that these ports are on.")


class TracingGroup(Group):
    """Traces of requests. What is sent, and where, is said by OpenTelemetry's own variables."""

    enabled: bool | None = Field(
        default=None, description="Record them; default: if OTEL_TRACES_EXPORTER or an OTLP endpoint is set."
    )
    accept_context: bool = Field(
        default=True,
        description="Go on with the trace that a client names in traceparent, as sampled or not as it says.",
    )
    flush_s: float = Field(default=3.0, ge=0, description="What a process that ends takes at most to send the last.")

    @property
    def exporters(self) -> tuple[str, ...]:
        """Return which exporters are to be used, as plug-ins are named; none if nothing is to be recorded."""
        return trace_exporters(enabled=self.enabled)
