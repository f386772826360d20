"""The gateway's front end. `create_app` is the one place that wires its parts together."""

from __future__ import annotations

from contextlib import ExitStack

from flask import Flask
from flask.json.provider import DefaultJSONProvider

from gateway_app.api import health, problems, tasks
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.governance.interceptor import GovernanceInterceptor
from gateway_app.pipeline import Pipeline
from gateway_app.profiles import Profiles
from gateway_app.streaming.relay import BLOCK_S, Relay
from gateway_app.streaming.watch import Watcher
from tasks.crypto import KeyWrapper, Signer
from tasks.db import Database
from tasks.errors import ConfigurationError, UnknownPolicy
from tasks.prompts.profile import read_profiles
from tasks.prompts.tokenizer import ModelTokenizer, resolve_checkpoint
from tasks.queueing.keys import QueueKeys
from tasks.queueing.message import MessageCodec
from tasks.queueing.publisher import Publisher, connect
from tasks.settings import Settings
from tasks.settings import settings as process_settings

#: What this release can run a task on: its own GPU workers.
AVAILABLE_PROVIDERS = ("hmcp_gateway",)


def create_app() -> Flask:
    """Return the application configured by this process's settings, for `flask run` and gunicorn.

    A configuration that cannot work ends the process with one clear message instead of a traceback.
    """
    try:
        return build(process_settings())
    except ConfigurationError as error:
        raise SystemExit(f"error: {error.detail}\nhint: {error.hint}") from None


def build(settings: Settings) -> Flask:
    """Return an application wired from `settings`. Raises ConfigurationError, which says what to correct.

    `app.extensions["closing"]` is an ExitStack that ends its threads and connections.
    """
    app = Flask(__name__)
    database = Database(settings.database)
    wrapper = KeyWrapper(settings.secrets.keys("master_key"))
    queue_keys = QueueKeys(settings.gateway.key_prefix)
    client = connect(settings.gateway.request_queue_url, settings.gateway.redis_timeout_s)
    publisher = Publisher(client, queue_keys, MessageCodec(Signer(settings.secrets.keys("signing_key")), wrapper))
    tokenizer = ModelTokenizer(resolve_checkpoint(settings.engine.model_source, settings.engine.revision))
    profiles = Profiles(
        read_profiles(settings.governance.profiles_directory),
        tokenizer,
        model_name=settings.engine.model_name,
        salt=settings.secrets.keys("organization_salt")[0],
        database=database,
        keys=wrapper,
    )
    try:
        governance = GovernanceInterceptor(settings.governance.policy, AVAILABLE_PROVIDERS)
    except UnknownPolicy as error:
        raise ConfigurationError(f"governance.policy: {error.detail}") from None
    pipeline = Pipeline(
        database=database,
        governance=governance,
        profiles=profiles,
        publisher=publisher,
        keys=wrapper,
        context_window=settings.engine.max_model_len or tokenizer.max_model_len,
    )
    relay_client = connect(settings.gateway.request_queue_url, BLOCK_S + settings.gateway.redis_timeout_s)
    relay = Relay(relay_client, client, settings.gateway.key_prefix, settings.streaming.buffer_frames)
    watcher = Watcher(
        database=database,
        client=client,
        relay=relay,
        keys=wrapper,
        prefix=settings.gateway.key_prefix,
        heartbeat_s=settings.streaming.heartbeat_s,
    )
    app.config["MAX_CONTENT_LENGTH"] = settings.gateway.max_body_bytes
    app.json = DefaultJSONProvider(app)
    app.json.sort_keys = False
    problems.install(app)
    app.register_blueprint(health.blueprint(database, publisher, client, queue_keys))
    keys = ApiKeys(database, settings.secrets.keys("key_pepper"))
    app.register_blueprint(tasks.blueprint(keys, pipeline, watcher))
    closing = app.extensions["closing"] = ExitStack()
    for close in (database.close, client.close, relay_client.close, relay.close):
        closing.callback(close)
    return app
