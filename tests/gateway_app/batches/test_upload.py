"""Multipart bodies of every kind: a good one is stored, of any other nothing stays, and none gets into memory whole."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway_app.batches.files import CHUNK_BYTES, Files
from gateway_app.batches.upload import receive
from gateway_app.governance.api_keys import Caller
from tasks.db import Database
from tasks.errors import InvalidRequest
from tasks.schema_batches import files as files_table

BOUNDARY = "b0undary"
CONTENT = b'{"custom_id": "a"}\n'


def part(disposition: str, content: bytes) -> bytes:
    """Return one part of a body."""
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + content + b"\r\n"


PURPOSE = part('name="purpose"', b"batch")
FILE = part('name="file"; filename="in.jsonl"', CONTENT)
END = f"--{BOUNDARY}--\r\n".encode()


class Receiver:
    """Receives bodies."""

    def __init__(self, files: Files, database: Database, caller: Caller) -> None:
        self.files, self.database, self.caller = files, database, caller

    def __call__(self, body: bytes, boundary: str = BOUNDARY) -> str:
        """Return the new file's id. The body must be read to its end in any case."""
        stream = io.BytesIO(body)
        try:
            return receive(self.files, self.database, self.caller, stream, boundary)
        finally:
            assert not stream.read()

    def visible(self) -> list[Any]:
        """Return what a list of files shows, once it is sure that nothing else is left."""
        query = sa.select(sa.func.count()).where(files_table.c.status == "uploading")
        assert self.database.read(lambda connection: connection.execute(query).scalar()) == 0
        return self.files.page("default", None, None, 100, ascending=True)


@pytest.fixture
def received(files: Files, database: Database, caller: Caller) -> Receiver:
    """Return the receiver."""
    return Receiver(files, database, caller)


EXPIRY = part('name="expires_after[anchor]"', b"created_at") + part('name="expires_after[seconds]"', b"7200")
GOOD = {
    "as OpenAI's client sends it": PURPOSE + FILE + END,
    "the file first": FILE + PURPOSE + END,
    "with an expiry": PURPOSE + EXPIRY + FILE + END,
    "a preamble": b"hello\r\n" + PURPOSE + FILE + END,
    "an epilogue": PURPOSE + FILE + END + b"bye",
    "bare line feeds": (PURPOSE + FILE + END).replace(b"\r\n", b"\n"),
    "the boundary in the file": PURPOSE + part('name="file"; filename="x"', b"--" + BOUNDARY.encode() + b"x\n") + END,
}


@pytest.mark.parametrize("name", GOOD)
def test_good(received: Receiver, name: str) -> None:
    """The file is there, for 30 days unless it says otherwise."""
    file = received.files.find(received(GOOD[name]), "default")
    content = b"".join(received.files.read(file))
    assert content == CONTENT or b"boundary" in name.encode() or CONTENT.strip() in content
    assert file.expires_at is not None
    lifetime = (file.expires_at - file.created_at).total_seconds()
    assert lifetime == (7200 if "expiry" in name else 30 * 24 * 3600)
    assert len(received.visible()) == 1


BAD = {
    "nothing": b"",
    "no boundary in it": b"hello",
    "only an end": END,
    "no file": PURPOSE + END,
    "a file that is a field": PURPOSE + part('name="file"', CONTENT) + END,
    "no purpose": FILE + END,
    "another purpose": part('name="purpose"', b"fine-tune") + FILE + END,
    "two purposes": PURPOSE + PURPOSE + FILE + END,
    "two files": PURPOSE + FILE + FILE + END,
    "a file of another name": PURPOSE + part('name="document"; filename="x"', CONTENT) + END,
    "a field beside": PURPOSE + part('name="colour"', b"blue") + FILE + END,
    "a field without a name": PURPOSE + part("x", b"blue") + FILE + END,
    "filename as a field": PURPOSE + FILE + part('name="filename"', b"x") + END,
    "a field that is no text": part('name="purpose"', b"\xff\xfe") + FILE + END,
    "a very long field": PURPOSE + part('name="expires_after[anchor]"', b"x" * 300_000) + FILE + END,
    "an expiry that is too soon": PURPOSE + part('name="expires_after[seconds]"', b"5") + FILE + END,
    "an expiry that is no number": PURPOSE + part('name="expires_after[seconds]"', b"soon") + FILE + END,
    "another anchor": PURPOSE + part('name="expires_after[anchor]"', b"never") + FILE + END,
    "no end": PURPOSE + FILE,
    "cut in the file": (PURPOSE + FILE)[:-10],
    "cut in a header": (PURPOSE + FILE)[: len(PURPOSE) + 30],
    "a header that never ends": f"--{BOUNDARY}\r\nX: ".encode() + b"y" * 1_000_000,
    "a preamble that never ends": b"y" * 1_000_000,
    "an epilogue that never ends": PURPOSE + FILE + END + b"y" * 1_000_000,
    "many parts": PURPOSE + FILE + part('name="x"', b"") * 200 + END,
    "no disposition": f"--{BOUNDARY}\r\nX: y\r\n\r\nz\r\n".encode() + PURPOSE + FILE + END,
    "headers that are no text": f"--{BOUNDARY}\r\n".encode() + b"\xff: \xff\r\n\r\nz\r\n" + PURPOSE + FILE + END,
    "a NUL in the filename": PURPOSE + part('name="file"; filename="a\x00b"', CONTENT) + END,
    "an escape in the filename": PURPOSE + part('name="file"; filename="a\x1b[31mb"', CONTENT) + END,
    "a very long filename": PURPOSE + part(f'name="file"; filename="{"x" * 300}"', CONTENT) + END,
}


@pytest.mark.parametrize("name", BAD)
def test_bad(received: Receiver, name: str) -> None:
    """Refused, with nothing left behind."""
    with pytest.raises(InvalidRequest) as refused:
        received(BAD[name])
    assert "blue" not in str(refused.value)
    assert received.visible() == []


@pytest.mark.parametrize("boundary", ["", "x" * 300, "other", "ü", "(.*"])
def test_bad_boundaries(received: Receiver, boundary: str) -> None:
    """None of these is found in the body."""
    with pytest.raises(InvalidRequest):
        received(PURPOSE + FILE + END, boundary)
    assert received.visible() == []


PIECES = [
    PURPOSE,
    FILE,
    END,
    b"\r\n",
    b"\n\n",
    b"--",
    BOUNDARY.encode(),
    b"--" + BOUNDARY.encode(),
    b"\r",
    b"\x00",
    b"a",
]
PIECES += [b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n', b"Content-Disposition: \xc3\r\n\r\n"]


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=14).map(b"".join))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_anything(received: Receiver, body: bytes) -> None:
    """No body does anything but be stored or be refused."""
    before = len(received.visible())
    try:
        received(body)
    except InvalidRequest:
        assert len(received.visible()) == before
    else:
        assert len(received.visible()) == before + 1


class Endless(io.RawIOBase):
    """A body of `size` bytes of file that is never in memory as a whole."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.pending = [PURPOSE + f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="x"'.encode()]
        self.pending.append(b"\r\n\r\n")
        self.ending = [b"\r\n" + END]

    def read(self, size: int = -1) -> bytes:
        """Return some of it."""
        if self.pending:
            return self.pending.pop(0)
        if self.left > 0:
            count = min(size, self.left)
            self.left -= count
            return (b"0123456789abcde\n" * (count // 16 + 1))[:count]
        return self.ending.pop() if self.ending else b""


def test_memory(received: Receiver) -> None:
    """An upload takes the memory of a few chunks, however large it is."""
    received(PURPOSE + FILE + END)
    size = 24 * 2**20
    tracemalloc.start()
    try:
        file_id = receive(received.files, received.database, received.caller, Endless(size), BOUNDARY)  # type: ignore[arg-type]
        uploading = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        file = received.files.find(file_id, "default")
        assert sum(map(len, received.files.read(file))) == file.size == size
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(uploading, reading) < 16 * CHUNK_BYTES
