"""Health, and the document itself: what answers without a key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from gateway_app.openapi.operation import Answer, Operation, Reply


class Alive(Answer):
    """The process answers."""

    status: Literal["ok"]


class Checks(Answer):
    """What is wrong with each part, or `ok`."""

    database: str
    queue: str
    worker: str
    housekeeper: str


class Readiness(Answer):
    """Whether requests are taken. `degraded`: they wait, without a worker or, where Redis lost them, a housekeeper."""

    status: Literal["ready", "degraded", "unavailable"]
    missing: list[Literal["database", "queue", "worker", "housekeeper"]]
    checks: Checks


class Document(Answer):
    """An OpenAPI document."""

    model_config = ConfigDict(extra="allow")

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]


OPERATIONS = (
    Operation(
        "get", "/healthz", "getHealth", "health", "Is the process alive?", {200: Reply("Yes.", Alive)}, public=True
    ),
    Operation(
        "get",
        "/readyz",
        "getReadiness",
        "health",
        "Are requests taken?",
        {
            200: Reply("Yes; without a worker or a housekeeper some wait.", Readiness),
            503: Reply("No: the database or the queue is missing, or the queue is nearly full.", Readiness),
        },
        public=True,
    ),
    Operation(
        "get",
        "/metrics",
        "getMetrics",
        "health",
        "Metrics for Prometheus",
        {200: Reply("Prometheus's text format; docs/metrics.md lists them.", bytes_types=("text/plain",))},
        public=True,
    ),
    Operation(
        "get",
        "/openapi.json",
        "getDocument",
        "health",
        "This document",
        {200: Reply("OpenAPI 3.1.", Document)},
        public=True,
    ),
)
