"""The parts of the gateway, made from settings: everything below HTTP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import redis

from gateway_app.cancelling import Canceller
from gateway_app.detection import Detector, texts_of
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.governance.interceptor import Findings, GovernanceInterceptor
from gateway_app.pipeline import Pipeline
from gateway_app.profiles import Profiles
from gateway_app.profiles.shipped import last_changed
from gateway_app.streaming.pump import Pump
from gateway_app.streaming.relay import BLOCK_S, Relay
from gateway_app.streaming.watch import Watcher
from gateway_app.synchronous import Synchronous
from tasks import tracing
from tasks.crypto import KeyWrapper, Signer, derive
from tasks.db import Database
from tasks.governance.metaqore import make_projects
from tasks.governance.policies import Policies, default_policy
from tasks.job import TaskRequest
from tasks.prompts.profile import read_profiles
from tasks.prompts.tokenizer import ModelTokenizer, resolve_checkpoint
from tasks.queueing.connecting import connect
from tasks.queueing.keys import QueueKeys
from tasks.queueing.message import MessageCodec
from tasks.queueing.publisher import Limits, Publisher
from tasks.queueing.together import Together
from tasks.settings import Settings


@dataclass(frozen=True, slots=True)
class Parts:
    """What routes are made over. `closing` ends its threads and connections, the last made first."""

    settings: Settings
    closing: ExitStack
    database: Database
    wrapper: KeyWrapper
    client: redis.Redis
    queue_keys: QueueKeys
    publisher: Publisher
    keys: ApiKeys
    policies: Policies
    profiles: Profiles
    pipeline: Pipeline
    watcher: Watcher
    pump: Pump
    canceller: Canceller
    synchronous: Synchronous


def make(settings: Settings) -> Parts:
    """Return the parts that `settings` describe. Raises ConfigurationError, which says what to correct."""
    closing = ExitStack()
    closing.callback(tracing.start(settings.tracing, "metaqore-gateway"))
    gateway, streaming = settings.gateway, settings.streaming
    database = Database(settings.database)
    closing.callback(database.close)
    wrapper = KeyWrapper(settings.secrets.keys("master_key"))
    queue_keys = QueueKeys(gateway.key_prefix)
    client = connect(gateway.request_queue_url, gateway.redis_timeout_s, gateway.redis_connections)
    closing.callback(client.close)
    codec = MessageCodec(Signer(settings.secrets.keys("signing_key")), wrapper)
    together = Together(client)
    publisher = Publisher(client, queue_keys, Limits.of(settings.scheduling), together)
    tokenizer = ModelTokenizer(resolve_checkpoint(settings.engine.model_source, settings.engine.revision))
    profiles = Profiles(
        read_profiles(settings.governance.profiles_directory),
        tokenizer,
        model_name=settings.engine.model_name,
        salt=settings.secrets.keys("organization_salt")[0],
        database=database,
        keys=wrapper,
        shipped_at=last_changed(settings.governance.profiles_directory),
    )
    policies = Policies(database, default_policy(settings.governance))
    projects = make_projects(settings)
    if projects is not None:
        closing.callback(projects.close)
    pipeline = Pipeline(
        database=database,
        governance=GovernanceInterceptor(policies, settings.governance.providers, _scanning(), projects),
        profiles=profiles,
        publisher=publisher,
        codec=codec,
        keys=wrapper,
        context_window=settings.engine.max_model_len or tokenizer.max_model_len,
        model_name=settings.engine.model_name,
        idempotency_secret=derive(settings.secrets.keys("key_pepper")[0], "idempotency", ""),
    )
    relay_client = connect(gateway.request_queue_url, BLOCK_S + gateway.redis_timeout_s)
    closing.callback(relay_client.close)
    relay = Relay(relay_client, together, gateway.key_prefix, streaming.buffer_frames)
    closing.callback(relay.close)
    watcher = Watcher(
        database=database,
        client=client,
        relay=relay,
        keys=wrapper,
        prefix=gateway.key_prefix,
        heartbeat_s=streaming.heartbeat_s,
    )
    pump = Pump(watcher)
    closing.callback(pump.close)
    canceller = Canceller(watcher, publisher, streaming.retention_s)
    return Parts(
        settings=settings,
        closing=closing,
        database=database,
        wrapper=wrapper,
        client=client,
        queue_keys=queue_keys,
        publisher=publisher,
        keys=ApiKeys(database, settings.secrets.keys("key_pepper")),
        policies=policies,
        profiles=profiles,
        pipeline=pipeline,
        watcher=watcher,
        pump=pump,
        canceller=canceller,
        synchronous=Synchronous(watcher, canceller, pump),
    )


def _scanning() -> Callable[[TaskRequest], Findings]:
    detector = Detector()
    return lambda task: detector.scan(texts_of(task))
