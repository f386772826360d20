"""The WebSocket routes alone, over the configured services, as an application to serve."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from flask import Flask

from gateway_app.api import problems
from gateway_app.api.conversation import Cancel, Submit
from gateway_app.api.sockets import Limits, blueprint
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.streaming.relay import BLOCK_S, Relay
from gateway_app.streaming.serving import OpenSockets
from gateway_app.streaming.watch import Watcher
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.queueing.connecting import connect
from tasks.queueing.together import Together
from tasks.settings import settings
from tests.played_worker import PREFIX


def refuse(*_: object) -> dict[str, Any]:
    """Take no task, and cancel none."""
    raise AssertionError


class SocketGateway:
    """What `create_app` wires, as far as sockets need it."""

    def __init__(
        self, limits: Limits | None = None, submit: Submit = refuse, cancel: Cancel = refuse, most: int = 50
    ) -> None:
        configured = settings()
        with ExitStack() as closing:
            database = Database(configured.database)
            closing.callback(database.close)
            url = configured.gateway.request_queue_url
            reading, other = connect(url, BLOCK_S + 15), connect(url, 15)
            for client in (reading, other):
                closing.callback(client.close)
            relay = Relay(reading, Together(other), PREFIX, configured.streaming.buffer_frames)
            closing.callback(relay.close)
            self.sockets = OpenSockets(most)
            wrapper = KeyWrapper(configured.secrets.keys("master_key"))
            watcher = Watcher(database, other, relay, wrapper, PREFIX, configured.streaming.heartbeat_s)
            keys = ApiKeys(database, configured.secrets.keys("key_pepper"))
            self.app = Flask("sockets")
            problems.install(self.app)
            self.app.register_blueprint(blueprint(keys, watcher, submit, cancel, limits or Limits(), self.sockets))
            self.closing = closing.pop_all()
