"""What client and server say to each other on a socket once it is open.

On `OneTask` the server alone speaks: it sends the task's frames, then closes. In a `Conversation` the client submits,
watches and cancels any number of tasks, and gets all their frames between the answers. An answer carries the `ref` and
the `id` of the message it answers, where that had any; a submitted task is watched without being asked for.

Operations run in the thread that serves the socket, one after the other: the next one, and the frames, wait for the one
before, as a rule for one commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, StringConstraints
from sqlalchemy.engine import Row
from wsproto.frame_protocol import CloseReason

from gateway_app.api import problems, reading
from gateway_app.governance.api_keys import Caller
from gateway_app.streaming.multiplex import Outcome, Watches
from gateway_app.streaming.socket import Socket
from gateway_app.streaming.watch import Watcher
from tasks.errors import GatewayError, InvalidRequest, NotFound, TooManyWatches
from tasks.job import Frozen
from tasks.logs import get_logger
from tasks.stream import START, Cursor, Frame

logger = get_logger(__name__)

Reference = Annotated[str, StringConstraints(max_length=200)]
#: Takes the caller, the task as `POST /v1/tasks` does, and an idempotency key; returns what that answers.
Submit = Callable[[Caller, Any, str | None], dict[str, Any]]
#: Takes the caller and a task's id; returns what the answer tells of it.
Cancel = Callable[[Caller, str], dict[str, Any]]


class _Message(Frozen):
    op: str
    ref: Reference | None = None


class _Submit(_Message):
    task: Any = None
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=reading.MAX_KEY_LENGTH)] | None = None


class _OfTask(_Message):
    id: str = Field(max_length=200)


class _Watch(_OfTask):
    cursor: str | None = Field(default=None, max_length=200)


class OneTask:
    """The server's side of a socket on which a single task is watched."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    def obey(self, text: str) -> None:
        """Ignore what the client says: there is nothing to say."""

    def show(self, _request_id: str, outcome: Outcome) -> None:
        """Send a frame; close after the last. Raises Gone then."""
        if isinstance(outcome, Frame):
            self._socket.send(_json(_content(outcome)))
        if isinstance(outcome, GatewayError):
            code = CloseReason.TRY_AGAIN_LATER if outcome.retryable else CloseReason.INTERNAL_ERROR
            self._socket.close(code, outcome.code)
        if outcome is None or (isinstance(outcome, Frame) and outcome.terminal):
            self._socket.close()


class Conversation:
    """The server's side of a socket for many tasks, of which `limit` may be watched at once."""

    def __init__(
        self,
        socket: Socket,
        watches: Watches,
        watcher: Watcher,
        caller: Caller,
        submit: Submit,
        cancel: Cancel,
        limit: int,
    ) -> None:
        self._socket = socket
        self._watches = watches
        self._watcher = watcher
        self._caller = caller
        self._submitter, self._canceller = submit, cancel
        self._limit = limit
        self._operations: dict[str, tuple[type[_Message], Callable[[Any, dict[str, Any]], None]]] = {
            "submit": (_Submit, self._submit),
            "watch": (_Watch, self._watch),
            "unwatch": (_OfTask, self._unwatch),
            "cancel": (_OfTask, self._cancel),
            "ping": (_Message, self._ping),
        }

    def show(self, request_id: str, outcome: Outcome) -> None:
        """Send what came of a watched task."""
        if isinstance(outcome, Frame):
            self._say("frame", {"task": request_id, **_content(outcome)})
        elif isinstance(outcome, GatewayError):
            self._say("error", {"id": request_id, "error": problems.describe(outcome)})
        else:
            self._say("unwatched", {"id": request_id})

    def obey(self, text: str) -> None:
        """Do what a message says, and answer it. Whatever is wrong with it is the answer."""
        about: dict[str, Any] = {}
        try:
            content = reading.parse(text, "message")
            about = {name: content[name] for name in ("ref", "id") if _short(content.get(name))}
            operation = content.get("op")
            if not isinstance(operation, str) or operation not in self._operations:
                raise InvalidRequest(f"`op` must be one of {', '.join(self._operations)}")
            model, act = self._operations[operation]
            act(reading.validate(model, content), about)
        except GatewayError as error:
            self._say("error", {**about, "error": problems.describe(error)})
        except Exception as error:
            # As everywhere: its text may quote what was sent, so only its kind and place are logged.
            logger.error("unexpected error on a socket", exc_info=error)
            self._say("error", {**about, "error": problems.describe(GatewayError())})

    def _submit(self, message: _Submit, about: dict[str, Any]) -> None:
        self._make_room()
        answer = self._submitter(self._caller, message.task, message.idempotency_key)
        about["id"] = answer["id"]
        self._say("accepted", {**about, **answer})
        self._watches.add(self._find(answer["id"]), START)

    def _watch(self, message: _Watch, about: dict[str, Any]) -> None:
        if message.id not in self._watches:
            self._make_room()
        row = self._find(message.id)
        self._watches.add(row, Cursor.parse(message.cursor))
        self._say("watching", {**about, "status": row.state})

    def _unwatch(self, message: _OfTask, about: dict[str, Any]) -> None:
        if not self._watches.drop(message.id):
            raise NotFound("this socket does not watch that task")
        self._say("unwatched", about)

    def _cancel(self, message: _OfTask, about: dict[str, Any]) -> None:
        self._find(message.id)
        self._say("cancelled", {**about, **self._canceller(self._caller, message.id)})

    def _ping(self, _message: _Message, about: dict[str, Any]) -> None:
        self._say("pong", about)

    def _make_room(self) -> None:
        if len(self._watches) >= self._limit:
            raise TooManyWatches(f"a socket watches at most {self._limit} tasks at once")

    def _find(self, request_id: str) -> Row[Any]:
        return self._watcher.find(request_id, self._caller.organization)

    def _say(self, operation: str, content: dict[str, Any]) -> None:
        self._socket.send(_json({"op": operation, **content}))


def _short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200  # noqa: PLR2004  as the models say


def _content(frame: Frame) -> dict[str, Any]:
    return {"id": str(frame.cursor), "event": frame.event, "data": frame.data}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
