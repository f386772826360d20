"""The words in which the tables describe the API: an operation, its replies, and the errors it can answer with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.errors import (
    BodyTooLarge,
    DatabaseUnavailable,
    GatewayError,
    InvalidJson,
    InvalidRequest,
    Unauthenticated,
    UnsupportedMediaType,
)

Method = Literal["get", "post", "put", "delete"]
Errors = tuple[type[GatewayError], ...]

#: What every operation that wants a key can answer with.
AUTHENTICATED: Errors = (Unauthenticated, DatabaseUnavailable)
#: What every operation that reads a JSON body can answer with.
READS_JSON: Errors = (InvalidJson, UnsupportedMediaType, BodyTooLarge, InvalidRequest)


class Answer(BaseModel):
    """Base of the models of answers. Tests refuse a field that is none of the model's; the document leaves it open."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def sometimes(description: str | None = None, *, alias: str | None = None) -> Any:
    """Return the default of a field that an answer may lack, and that is never null where it is there."""
    return Field(default=None, description=description, alias=alias)


@dataclass(frozen=True, slots=True)
class Link:
    """Where an answer leads: the operation, and which of its parameters and of its body are which part of the answer."""

    operation: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stream:
    """Server-sent events: the models of their data, by the event's name; one without a name is a `message`.

    `cursors` tells whether events have ids, `last` is the data of a last one that is not JSON.
    """

    events: Mapping[str, tuple[type[BaseModel], ...]]
    cursors: bool = False
    last: str | None = None

    @property
    def models(self) -> list[type[BaseModel]]:
        """Return all models."""
        return [model for models in self.events.values() for model in models]


@dataclass(frozen=True, slots=True)
class Reply:
    """A success: JSON described by `model`, a stream, bytes of one of the `bytes_types`, or nothing.

    `headers` are names of `document.HEADERS`.
    """

    description: str
    model: type[BaseModel] | None = None
    stream: Stream | None = None
    bytes_types: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    example: Any = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One method on one path. `name` is its operationId.

    `errors` are those beside `internal_error`, and beside `AUTHENTICATED` unless the operation is `public`;
    `late_errors` can only come in a stream or on a socket, when the status has been sent. `body`,
    `query` and `headers` are the models that read the request; an alias is the name that is sent. `bodies` are
    examples by name.
    """

    method: Method
    path: str
    name: str
    tag: str
    summary: str
    replies: Mapping[int, Reply]
    errors: Errors = ()
    late_errors: Errors = ()
    description: str = ""
    body: type[BaseModel] | None = None
    body_media_type: str = "application/json"
    body_required: bool = True
    bodies: Mapping[str, Any] = field(default_factory=dict)
    query: type[BaseModel] | None = None
    headers: type[BaseModel] | None = None
    public: bool = False
    websocket: bool = False

    @property
    def all_errors(self) -> Errors:
        """Return every error it can answer with."""
        return tuple(dict.fromkeys((*self.errors, *(() if self.public else AUTHENTICATED), GatewayError)))
