"""OpenAI's own client against the routes, the driver in its thread, and a worker that answers after a while."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests
import sqlalchemy as sa
from flask import Flask
from werkzeug.http import parse_options_header
from werkzeug.serving import make_server

from gateway_app.api import batches as batch_routes
from gateway_app.api import files as file_routes
from gateway_app.api import problems
from gateway_app.batches.batches import Batches
from gateway_app.batches.driver import Driver
from gateway_app.batches.files import Files
from gateway_app.governance.api_keys import ApiKeys
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.schema_batches import files as files_table
from tests.gateway_app.batches.fakes import URL, FakeGateway, jsonl, line
from tests.services import wait_until
from tests.serving import QuietHandler

MAX_BYTES = 2**20
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class Served:
    """A gateway with a client of its own and one of another organization."""

    url: str
    client: openai.OpenAI
    stranger: openai.OpenAI
    working: threading.Event

    def upload(self, *lines: Any) -> str:
        """Upload lines as a batch's input and return the file's id."""
        return self.client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch").id

    def create(self, *lines: Any, **options: Any) -> Any:
        """Begin a batch over lines."""
        asked: dict[str, Any] = {"endpoint": URL, "completion_window": "24h", **options}
        return self.client.batches.create(input_file_id=self.upload(*lines), **asked)

    def ended(self, batch_id: str) -> Any:
        """Return a batch once it has ended."""
        done = lambda: self.client.batches.retrieve(batch_id).status in ENDED  # noqa: E731
        wait_until(done, 60, "the end of the batch")
        return self.client.batches.retrieve(batch_id)


@pytest.fixture
def served(
    database: Database, keys: KeyWrapper, files: Files, batches: Batches, gateway: FakeGateway
) -> Iterator[Served]:
    """Serve the routes."""
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 64 * 1024
    problems.install(app)
    api_keys = ApiKeys(database, (b"pepper",))
    driver = Driver(gateway.services(files, poll_s=0.02), scout_s=0.2)
    app.register_blueprint(file_routes.blueprint(api_keys, files, database, MAX_BYTES))
    app.register_blueprint(batch_routes.blueprint(api_keys, batches, driver))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=QuietHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    clients = [
        openai.OpenAI(base_url=f"{url}/v1", api_key=api_keys.create(organization, "test")[1], max_retries=0)
        for organization in ("default", "other")
    ]
    working, closing = threading.Event(), threading.Event()

    def work() -> None:
        while not closing.wait(0.02):
            if working.is_set():
                gateway.work()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    working.set()
    yield Served(url, clients[0], clients[1], working)
    closing.set()
    worker.join()
    for client in clients:
        client.close()
    server.shutdown()
    thread.join()
    server.server_close()
    driver.close()


def test_files(served: Served) -> None:
    """Create, retrieve, list, read and delete."""
    client = served.client
    content = jsonl(*(line(f"r-{number}", body={"pad": "x" * 1000}) for number in range(700)))
    created = client.files.create(file=("my file.jsonl", content), purpose="batch")
    assert created.id.startswith("file-")
    assert (created.object, created.purpose, created.status) == ("file", "batch", "processed")
    assert (created.filename, created.bytes) == ("my file.jsonl", len(content))
    assert created.expires_at == created.created_at + 30 * 24 * 3600
    short = client.files.create(
        file=("b.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert short.expires_at == short.created_at + 3600
    assert client.files.retrieve(created.id) == created
    assert client.files.content(created.id).content == content
    assert b"".join(client.files.content(created.id).iter_bytes(1000)) == content
    assert [file.id for file in client.files.list()] == [short.id, created.id]
    assert [file.id for file in client.files.list(limit=1, order="asc")] == [created.id, short.id]
    assert list(client.files.list(purpose="batch_output")) == []
    deleted = client.files.delete(created.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (created.id, True, "file")
    assert [file.id for file in client.files.list()] == [short.id]
    gone: list[Callable[[str], Any]] = [client.files.retrieve, client.files.content, client.files.delete]
    for call in gone:
        with pytest.raises(openai.NotFoundError) as refused:
            call(created.id)
        assert refused.value.code == "not_found"


@pytest.mark.parametrize("name", ["日本 €.jsonl", 'a"b;c\\.jsonl', "näme.jsonl"])
def test_a_file_is_saved_under_its_name(served: Served, name: str) -> None:
    """Headers hold Latin-1 alone; a name of another script must not cost the download."""
    created = served.client.files.create(file=(name, b"{}"), purpose="batch")
    answer = served.client.files.content(created.id).response
    assert answer.content == b"{}"
    options = parse_options_header(answer.headers["Content-Disposition"])[1]
    assert options["filename"] == created.filename == name


def test_tenants(served: Served) -> None:
    """Another organization finds nothing of it, as if it had never been."""
    file_id = served.upload(line("a"))
    batch = served.create(line("b"))
    stranger = served.stranger
    calls: list[Callable[[], Any]] = [
        lambda: stranger.files.retrieve(file_id),
        lambda: stranger.files.content(file_id),
        lambda: stranger.files.delete(file_id),
        lambda: stranger.batches.retrieve(batch.id),
        lambda: stranger.batches.cancel(batch.id),
        lambda: stranger.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert list(stranger.files.list()) == []
    assert list(stranger.batches.list()) == []
    assert served.client.files.retrieve(file_id).id == file_id


def test_a_batch(served: Served) -> None:
    """Create, watch, read the answers; the input can be deleted once it has ended."""
    created = served.create(*(line(f"r-{number}") for number in range(30)), metadata={"team": "blue"})
    assert created.id.startswith("batch_")
    assert (created.object, created.endpoint, created.completion_window) == ("batch", URL, "24h")
    assert (created.status, created.metadata) == ("validating", {"team": "blue"})
    assert created.expires_at == created.created_at + 24 * 3600
    batch = served.ended(created.id)
    assert batch.status == "completed", batch
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (30, 30, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.failed_at is batch.cancelled_at is batch.expired_at is batch.cancelling_at is None
    assert batch.usage.total_tokens == 360
    assert batch.errors is None
    assert batch.error_file_id is None
    output = served.client.files.content(batch.output_file_id).text
    answers = [json.loads(text) for text in output.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"r-{number}" for number in range(30)]
    assert served.client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert served.client.files.delete(batch.input_file_id).deleted


def test_a_batch_that_is_not_valid(served: Served) -> None:
    """Its errors name their lines."""
    batch = served.ended(served.create(line("a"), line("a"), line("b", method="GET")).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert [(error.code, error.line, error.param) for error in batch.errors.data] == [
        ("duplicate_custom_id", 2, "custom_id"),
        ("invalid_method", 3, "method"),
    ]


def test_cancelling(served: Served) -> None:
    """Cancel and read what there is; what a batch reads cannot be deleted before."""
    served.working.clear()
    created = served.create(line("a"), line("b"))
    with pytest.raises(openai.ConflictError) as refused:
        served.client.files.delete(created.input_file_id)
    assert refused.value.code == "file_in_use"
    wait_until(lambda: served.client.batches.retrieve(created.id).status == "in_progress", 30, "validation")
    assert served.client.batches.cancel(created.id).status == "cancelling"
    batch = served.ended(created.id)
    assert (batch.status, batch.request_counts.total) == ("cancelled", 2)
    assert batch.cancelling_at <= batch.cancelled_at
    assert served.client.batches.cancel(created.id).status == "cancelled"


def test_listing_batches(served: Served) -> None:
    """The newest first, in pages."""
    ids = [served.create(line("a")).id for _ in range(5)]
    assert [batch.id for batch in served.client.batches.list(limit=2)] == ids[::-1]
    page = served.client.batches.list(limit=2, after=ids[3])
    assert [batch.id for batch in page.data] == [ids[2], ids[1]]
    assert page.has_more
    raw = requests.get(f"{served.url}/v1/batches?limit=100", headers=served.client.auth_headers, timeout=10).json()
    assert (raw["object"], raw["first_id"], raw["last_id"], raw["has_more"]) == ("list", ids[4], ids[0], False)
    for batch_id in ids:
        served.ended(batch_id)


BAD_BATCHES: dict[str, dict[str, Any]] = {
    "another endpoint": {"endpoint": "/v1/embeddings"},
    "another window": {"completion_window": "1h"},
    "an unknown field": {"extra_body": {"colour": "blue"}},
    "much metadata": {"metadata": {str(number): "x" for number in range(17)}},
    "a long value": {"metadata": {"a": "x" * 513}},
    "a long key": {"metadata": {"a" * 65: "x"}},
    "a number as value": {"metadata": {"a": 1}},
    "a short expiry": {"extra_body": {"output_expires_after": {"anchor": "created_at", "seconds": 5}}},
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches(served: Served, name: str) -> None:
    """Refused with OpenAI's error object, which names the field and not the value."""
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        served.create(line("a"), **BAD_BATCHES[name])
    assert refused.value.code == "invalid_request"
    assert refused.value.param
    assert "blue" not in refused.value.message
    assert list(served.client.batches.list()) == []


@pytest.mark.parametrize("path", ["files?limit=0", "files?order=up", "files?after=x", "files?x=1", "batches?limit=101"])
def test_bad_queries(served: Served, path: str) -> None:
    """A parameter that could not be honoured is refused."""
    answer = requests.get(f"{served.url}/v1/{path}", headers=served.client.auth_headers, timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("name", ["x", "file-%00", "file-" + "0" * 32, "..%2f..%2fetc", "file-" + "G" * 32, "ü"])
def test_ids_that_are_none(served: Served, name: str) -> None:
    """All are simply not found."""
    for path in (f"files/{name}", f"files/{name}/content", f"batches/{name}"):
        answer = requests.get(f"{served.url}/v1/{path}", headers=served.client.auth_headers, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_uploads_that_are_none(served: Served) -> None:
    """Too large, no form, or no key; up to the limit is fine, though other bodies may not be as large."""
    client = served.client
    assert client.files.create(file=("x", b"x" * MAX_BYTES), purpose="batch").bytes == MAX_BYTES
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("x", b"x" * (MAX_BYTES + 100_000)), purpose="batch")
    assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")
    with pytest.raises(openai.UnprocessableEntityError):
        client.files.create(file=("x", b"x"), purpose="fine-tune")
    answer = requests.post(f"{served.url}/v1/files", json={}, headers=client.auth_headers, timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").files.create(file=("x", b"x"), purpose="batch")
    assert len(list(client.files.list())) == 1


def multipart(content: bytes) -> bytes:
    """Return an upload's body, with the boundary x."""
    fields = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    return (
        fields
        + b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (MAX_BYTES, 200), (MAX_BYTES + 200_000, 413)])
def test_an_upload_of_unknown_length(served: Served, size: int, status: int) -> None:
    """Chunked transfer, as of a client that reads from a pipe."""
    headers = {**served.client.auth_headers, "Content-Type": "multipart/form-data; boundary=x"}
    body = multipart(b"y" * size)
    pieces = (body[start : start + 5000] for start in range(0, len(body), 5000))
    answer = requests.post(f"{served.url}/v1/files", data=pieces, headers=headers, timeout=30)
    assert answer.status_code == status, answer.text
    assert [file.bytes for file in served.client.files.list()] == ([size] if status == 200 else [])


def test_an_upload_that_breaks_off(served: Served, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored of it is deleted."""
    # The driver's first round may come after the file was deleted, and would sweep it away.
    monkeypatch.setattr(Files, "sweep", lambda _files: None)
    body = multipart(b"y" * 600_000)
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            + f"Authorization: {served.client.auth_headers['Authorization']}\r\n".encode()
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body[:400_000]
        )
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    assert b" 422 " in answer.splitlines()[0]
    assert list(served.client.files.list()) == []
    query = sa.select(files_table.c.status)
    assert database.read(lambda on: list(on.execute(query).scalars())) == ["deleted"]
