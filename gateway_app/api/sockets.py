"""WebSockets: `/v1/tasks/{id}/stream` for one task, `/v1/stream` for any number of them.

Everything that can be refused is refused before the handshake, as an ordinary HTTP answer: origin, key, task, cursor,
and a socket too many. A key is looked at again while its socket is open, so that revoking it ends the socket too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from flask import Blueprint, Response, g, request
from flask.blueprints import BlueprintSetupState
from flask_sock import Sock  # type: ignore[import-untyped]
from simple_websocket import Server  # type: ignore[import-untyped]
from wsproto.frame_protocol import CloseReason

from gateway_app.api import handshake
from gateway_app.api.conversation import Cancel, Conversation, OneTask, Submit
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.streaming.multiplex import Watches
from gateway_app.streaming.serving import OpenSockets, Side, serve
from gateway_app.streaming.socket import Gone, Socket, SocketLimits
from gateway_app.streaming.watch import Watcher
from tasks.errors import DatabaseUnavailable, Unauthenticated, UpgradeRequired
from tasks.logs import get_logger
from tasks.stream import Cursor

logger = get_logger(__name__)
_TICK_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows. `watches` is how many tasks one socket may watch at once."""

    allowed_origins: tuple[str, ...] = ()
    watches: int = 1000
    socket: SocketLimits = field(default_factory=SocketLimits)
    #: How long a revoked key goes on working on a socket that is open.
    recheck_key_s: float = 15.0


def blueprint(
    keys: ApiKeys, watcher: Watcher, submit: Submit, cancel: Cancel, limits: Limits, sockets: OpenSockets
) -> Blueprint:
    """Return the routes, over what they need."""
    views = _Views(keys, watcher, submit, cancel, limits, sockets)
    routes, sock = Blueprint("sockets", __name__, url_prefix="/v1"), Sock()
    routes.record_once(_configure)
    routes.before_request(views.check)
    routes.register_error_handler(OSError, _lost)
    for path, view in (("/tasks/<request_id>/stream", views.one), ("/stream", views.many)):
        sock.route(path, bp=routes)(view)
        routes.add_url_rule(path, f"plain_{view.__name__}", _plain, methods=["GET"])
    return routes


@dataclass(frozen=True, slots=True)
class _Views:
    keys: ApiKeys
    watcher: Watcher
    submit: Submit
    cancel: Cancel
    limits: Limits
    sockets: OpenSockets

    def check(self) -> Response | None:
        """Refuse what can be refused, while the answer can still be an HTTP one."""
        handshake.check_origin(self.limits.allowed_origins)
        g.authorization = handshake.authorization()
        g.caller = self.keys.authenticate(g.authorization)
        refusal = handshake.check_upgrade()
        if refusal is not None:
            return refusal
        request_id = (request.view_args or {}).get("request_id")
        if request_id is not None:
            g.row = self.watcher.find(request_id, g.caller.organization)
            g.cursor = Cursor.parse(request.args.get("cursor"))
            # Asked for the check alone.
            self.watcher.frames(g.row, g.cursor)
        self.sockets.check()
        handshake.tidy(request.environ)
        return None

    def one(self, server: Server, request_id: str) -> None:  # noqa: ARG002  `check` found the row by it
        """Send the frames of one task."""

        def begin(socket: Socket, watches: Watches) -> Side:
            watches.add(g.row, g.cursor)
            return OneTask(socket)

        self._run(server, begin)

    def many(self, server: Server) -> None:
        """Submit, watch and cancel any number of tasks."""

        def begin(socket: Socket, watches: Watches) -> Side:
            most = self.limits.watches
            return Conversation(socket, watches, self.watcher, g.caller, self.submit, self.cancel, most)

        self._run(server, begin)

    def _run(self, server: Server, begin: Callable[[Socket, Watches], Side]) -> None:
        with self.sockets.opened(server, self.limits.socket) as socket, suppress(Gone):
            watches = Watches(self.watcher, g.caller.organization, socket.wake)
            check_key = _KeyCheck(self.keys, g.authorization, self.limits.recheck_key_s, socket)
            try:
                tick_s = min(_TICK_S, self.limits.recheck_key_s, self.watcher.heartbeat_s)
                serve(socket, watches, begin(socket, watches), check_key, tick_s)
            except Gone:
                raise
            except Exception as error:
                # As everywhere: its text may quote what was sent, so only its kind and place are logged.
                logger.error("unexpected error on a socket", exc_info=error)
                socket.close(CloseReason.INTERNAL_ERROR, "internal_error")
            finally:
                watches.close()


def _configure(state: BlueprintSetupState) -> None:
    """Have flask-sock make nothing but the handshake."""
    options = {"thread_class": handshake.Unstarted, "subprotocols": [handshake.SUBPROTOCOL]}
    state.app.config.setdefault("SOCK_SERVER_OPTIONS", {}).update(options)


def _plain(**_arguments: str) -> Response:
    """Have a rule for plain requests, which `check` has answered by now."""
    raise UpgradeRequired


def _lost(_error: OSError) -> Response:
    """Answer nobody: the client went away in the middle of the handshake."""
    return Response(status=400)


class _KeyCheck:
    """Closes the socket of a key that was revoked."""

    def __init__(self, keys: ApiKeys, authorization: str | None, every_s: float, socket: Socket) -> None:
        self._keys = keys
        self._authorization = authorization
        self._every_s = every_s
        self._socket = socket
        self._next = time.monotonic() + self._every_s

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        try:
            self._keys.authenticate(self._authorization)
        except Unauthenticated as error:
            self._socket.close(CloseReason.POLICY_VIOLATION, error.code)
        except DatabaseUnavailable:
            pass
