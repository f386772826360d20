"""The gateway's front end. `create_app` is the one place that wires its parts together."""

from __future__ import annotations

from typing import Any

import click
from flask import Flask
from flask.cli import NoAppException
from flask.json.provider import DefaultJSONProvider

from gateway_app import access, parts, tracing
from gateway_app.api import (
    audit,
    batches,
    cache,
    chat,
    files,
    health,
    models,
    openapi,
    policy,
    problems,
    profiles,
    responses,
    sockets,
    tasks,
)
from gateway_app.batches.batches import Batches
from gateway_app.batches.driver import Driver
from gateway_app.batches.endpoints import Endpoints
from gateway_app.batches.files import Files
from gateway_app.batches.ports import Limits, Services
from gateway_app.governance.api_keys import Caller
from gateway_app.kv_cache.own import OwnProfiles
from gateway_app.kv_cache.view import CacheView
from gateway_app.metrics import exposing
from gateway_app.parts import Parts
from gateway_app.profiles.management import manage
from gateway_app.profiles.wishes import Wishes
from gateway_app.streaming.serving import OpenSockets
from gateway_app.streaming.socket import SocketLimits
from tasks import logs
from tasks.errors import ConfigurationError
from tasks.settings import Settings
from tasks.settings import settings as process_settings


def create_app() -> Flask:
    """Return the application configured by this process's settings, for `flask run` and gunicorn.

    A configuration that cannot work ends the process with one clear message instead of a traceback.
    """
    try:
        options = process_settings()
        logs.ensure(options.logs)
        return build(options)
    except ConfigurationError as error:
        says = f"error: {error.detail}\nhint: {error.hint}"
        context = click.get_current_context(silent=True)
        if context is not None and context.parent is None:
            # `flask --help` looks for commands of the application, and goes on without.
            raise NoAppException(says) from None
        raise SystemExit(says) from None


def build(settings: Settings) -> Flask:
    """Return an application wired from `settings`. Raises ConfigurationError, which says what to correct.

    `app.extensions["closing"]` is an ExitStack that ends its threads and connections.
    """
    made = parts.make(settings)
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.gateway.max_body_bytes
    app.json = DefaultJSONProvider(app)
    app.json.sort_keys = False
    app.extensions |= {"closing": made.closing, "pump": made.pump}
    tracing.install(app, accept_context=settings.tracing.accept_context)
    access.install(app)
    problems.install(app)
    _native(app, made)
    _openai(app, made)
    exposing.install(app, made, app.extensions["sockets"])
    return app


def _native(app: Flask, made: Parts) -> None:
    window, limits_of_profiles = made.pipeline.context_window, made.settings.profiles
    wishes = Wishes(made.client, made.queue_keys) if made.settings.caching.keeps_prefixes else None
    management = manage(made.profiles, made.database, made.wrapper, window, limits_of_profiles, wishes)
    caches = CacheView(made.database, made.client, made.queue_keys)
    app.extensions["pins"] = management.pins
    streaming = made.settings.streaming
    open_sockets = OpenSockets(streaming.max_sockets)
    app.extensions["sockets"] = open_sockets
    made.closing.callback(open_sockets.close)
    limits = sockets.Limits(
        allowed_origins=streaming.allowed_origins,
        socket=SocketLimits(
            message_bytes=made.settings.gateway.max_body_bytes,
            send_timeout_s=streaming.socket_send_timeout_s,
            ping_interval_s=streaming.ping_interval_s,
        ),
    )

    def submit(caller: Caller, task: Any, key: str | None) -> dict[str, Any]:
        with tracing.apart("task on a socket"):
            try:
                return tasks.submit_content(made.pipeline, caller, task, key)
            finally:
                # The socket's thread goes on with whatever comes next.
                logs.bind_request(None)

    def cancel(caller: Caller, request_id: str) -> dict[str, Any]:
        return tasks.summary(made.canceller.cancel(request_id, caller.organization, wait_s=0))

    for routes in (
        health.blueprint(made.database, made.publisher, made.client, made.queue_keys),
        tasks.blueprint(made.keys, made.pipeline, made.synchronous),
        sockets.blueprint(made.keys, made.watcher, submit, cancel, limits, open_sockets),
        policy.blueprint(made.keys, made.policies),
        audit.blueprint(made.keys, made.database, made.settings.audit.max_exports),
        profiles.blueprint(made.keys, management),
        cache.blueprint(made.keys, caches, OwnProfiles(made.database, made.profiles)),
        openapi.blueprint(),
    ):
        app.register_blueprint(routes)


def _openai(app: Flask, made: Parts) -> None:
    settings, tool_parser = made.settings, made.settings.engine.tool_parser
    stored = Files(made.database, made.wrapper)
    endpoints = Endpoints(made.pipeline, made.watcher, tool_parser)
    driver = Driver(
        Services(
            database=made.database,
            files=stored,
            keys=made.wrapper,
            submit=endpoints.submit,
            render=endpoints.render,
            cancel=lambda request_id, organization: made.canceller.cancel(request_id, organization, wait_s=0),
            limits=Limits(max_line_bytes=settings.gateway.max_body_bytes),
        )
    )
    made.closing.callback(driver.close)
    for routes in (
        chat.blueprint(made.keys, made.pipeline, made.synchronous, tool_parser),
        responses.blueprint(made.keys, made.pipeline, made.synchronous, made.canceller, tool_parser),
        models.blueprint(made.keys, made.profiles, settings.engine.model_name),
        files.blueprint(made.keys, stored, made.database, settings.files.max_bytes),
        batches.blueprint(made.keys, Batches(made.database, made.wrapper), driver),
    ):
        app.register_blueprint(routes)
