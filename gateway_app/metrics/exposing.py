"""Where a gateway's metrics are to be had: `/metrics` on its own port, or a port of their own."""

from __future__ import annotations

from flask import Blueprint, Flask, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import CollectorRegistry

from gateway_app.metrics import http
from gateway_app.metrics.queue import TIMEOUT_S, QueueReadings
from gateway_app.metrics.readings import GatewayReadings
from gateway_app.parts import Parts
from gateway_app.streaming.serving import OpenSockets
from tasks.metrics.making import told_by
from tasks.metrics.own import Own
from tasks.metrics.serving import serve
from tasks.queueing.connecting import connect
from tasks.queueing.publisher import Limits


def install(app: Flask, made: Parts, sockets: OpenSockets) -> None:
    """Count the requests of `app`, and tell its metrics where the settings say."""
    settings = made.settings
    url = settings.gateway.request_queue_url
    queue = QueueReadings(lambda: connect(url, TIMEOUT_S, 1), made.queue_keys, Limits.of(settings.scheduling))
    made.closing.callback(queue.close)
    readings = GatewayReadings(made.pump, sockets, settings)
    registry = told_by("gateway", Own("gateway", made.database, made.client), readings, queue)
    http.install(app)
    if settings.metrics.gateway_port is None:
        app.register_blueprint(_blueprint(registry))
    else:
        made.closing.callback(serve(registry, settings.metrics.host, settings.metrics.gateway_port))


def _blueprint(registry: CollectorRegistry) -> Blueprint:
    routes = Blueprint("metrics", __name__)

    @routes.get("/metrics")
    def show() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    return routes
