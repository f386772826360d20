"""An upload's multipart body, read into storage as it arrives.

Flask's own form parser would first spool the file to a temporary file, in plain text. Here each piece goes from the
socket to a `FileWriter`, which holds no more than a chunk. Fields may come before or after the file, so the file is
stored first and judged at the end; what turns out wrong is destroyed. A body is read to its end even when it is
already known to be wrong, since a client that is still sending does not listen.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, File, MultipartDecoder, NeedData
from werkzeug.sansio.multipart import Field as TextField

from gateway_app.api.reading import validate
from gateway_app.batches.files import Files, FileWriter
from gateway_app.governance.api_keys import Caller
from tasks.db import Database
from tasks.errors import GatewayError, InvalidRequest

#: How long OpenAI keeps a batch's input file if the upload does not say.
DEFAULT_LIFETIME_S = 30 * 24 * 3600
_READ_BYTES = 64 * 1024
#: What the decoder may hold back: the headers of one part, or what comes before the first and after the last.
_HELD_BYTES = 4 * _READ_BYTES
_MAX_FIELD_BYTES = 4096
_MAX_PARTS = 16
_MAX_BOUNDARY = 200


class Upload(BaseModel):
    """What an upload says besides the content, by the names that OpenAI's clients give it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: Literal["batch"]
    anchor: Literal["created_at"] = Field(default="created_at", alias="expires_after[anchor]")
    seconds: int = Field(default=DEFAULT_LIFETIME_S, alias="expires_after[seconds]", ge=3600, le=DEFAULT_LIFETIME_S)


class _Filename(BaseModel):
    filename: Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]


def receive(files: Files, database: Database, caller: Caller, stream: IO[bytes], boundary: str) -> str:
    """Store the upload in `stream` as a file of the caller's; return its id.

    Raises InvalidRequest if it is not what an upload must be, RequestEntityTooLarge if `stream` does.
    """
    parts = _Parts(files, caller)
    try:
        for event in _events(stream, boundary):
            parts.take(event)
        writer, upload = parts.finished()
        writer.flush()
        lifetime = timedelta(seconds=upload.seconds)
        database.write(lambda connection: writer.finish(connection, upload.purpose, lifetime))
    except BaseException:  # whatever ended the upload, nothing of it may stay
        parts.abandon()
        raise
    return writer.file_id


class _Parts:
    """What has come in. After a problem, the rest is only read."""

    def __init__(self, files: Files, caller: Caller) -> None:
        self._files = files
        self._caller = caller
        self._fields: dict[str, str] = {}
        self._name = ""
        self._text: bytearray | None = None
        self._writer: FileWriter | None = None
        self._problem: GatewayError | None = None

    def take(self, event: Event) -> None:
        if self._problem is None:
            try:
                self._take(event)
            except GatewayError as error:
                self._problem = error

    def finished(self) -> tuple[FileWriter, Upload]:
        if self._problem is not None:
            raise self._problem
        upload = validate(Upload, self._fields)
        if self._writer is None:
            raise _invalid("file", "is missing: send the content as a part named file, with a filename")
        return self._writer, upload

    def abandon(self) -> None:
        if self._writer is not None:
            try:
                self._writer.abandon()
            except GatewayError:
                # The database is away; `Files.sweep` finds it.
                return

    def _take(self, event: Event) -> None:
        if isinstance(event, File):
            if event.name != "file" or self._writer is not None:
                raise _invalid("file", "must be sent once, as the only part with a filename")
            filename = validate(_Filename, {"filename": event.filename or "file"}).filename
            self._text = None
            self._writer = self._files.open(self._caller, filename)
        elif isinstance(event, TextField):
            self._name, self._text = event.name or "", bytearray()
        elif isinstance(event, Data) and self._text is not None:
            self._text += event.data
            if len(self._text) > _MAX_FIELD_BYTES:
                raise _invalid("body", f"has a field longer than {_MAX_FIELD_BYTES} bytes")
            if not event.more_data:
                self._keep(bytes(self._text))
        elif isinstance(event, Data) and self._writer is not None:
            self._writer.write(event.data)

    def _keep(self, value: bytes) -> None:
        if self._name in self._fields:
            raise _invalid("body", "has a field more than once")
        try:
            self._fields[self._name] = value.decode()
        except UnicodeDecodeError:
            raise _invalid("body", "has a field that is not UTF-8 text") from None


def _events(stream: IO[bytes], boundary: str) -> Iterator[Event]:
    """Return the body's events up to its end. Raises InvalidRequest if it is no multipart body or ends too early."""
    malformed = not 0 < len(boundary) <= _MAX_BOUNDARY
    decoder = MultipartDecoder(boundary.encode("latin-1", "replace"), _HELD_BYTES, max_parts=_MAX_PARTS)
    more = True
    while more:
        data = stream.read(_READ_BYTES)
        more = bool(data)
        if malformed:
            continue
        try:
            decoder.receive_data(data or None)
            while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
                yield event
        except (ValueError, RequestEntityTooLarge):
            malformed = True
    if malformed:
        raise InvalidRequest("the body is not a complete multipart/form-data body of few and small fields and one file")


def _invalid(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {message}", errors=[{"field": name, "message": message}])
