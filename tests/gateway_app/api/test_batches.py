"""Batches through the whole gateway and a simulated worker, with the `openai` client as it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from openai.types import Batch
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from tests.services import wait_until
from tests.serving import Served, standing
from tests.workers import ROOT

AGENT = "incident-responder"
CANARY = "canary-93b1-the-disk-of-db-7-is-full"
CHAT: Any = "/v1/chat/completions"
RESPONSES: Any = "/v1/responses"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the gateway of this module keeps its database."""
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def served(folder: Path, tiny_model: Path) -> Iterator[Served]:
    """Return a gateway with a simulated worker, shared by this module's tests."""
    with standing(folder, tiny_model) as made:
        yield made


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    """Return the client as a team would make it."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as made:
        yield made


def chat(custom_id: str, **changes: Any) -> dict[str, Any]:
    """Return a line that asks for a chat completion."""
    messages = [{"role": "user", "content": f"What is on fire? {CANARY}"}]
    body = {"model": AGENT, "messages": messages, "max_tokens": 8, "seed": 5, **changes}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def start(client: openai.OpenAI, lines: list[dict[str, Any]], endpoint: Any = CHAT) -> Batch:
    """Begin a batch over lines."""
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    """Return a batch once it has ended."""
    done = ("completed", "failed", "expired", "cancelled")
    wait_until(lambda: client.batches.retrieve(batch.id).status in done, 120, "the end of the batch")
    return client.batches.retrieve(batch.id)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """Return the lines of a file by their custom_id."""
    assert file_id is not None
    lines = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    return {line["custom_id"]: line for line in lines}


def rows(folder: Path, query: str) -> list[Any]:
    """Return what a query finds in the gateway's database."""
    engine = sa.create_engine(f"sqlite:///{folder / 'gateway.db'}")
    with engine.connect() as connection:
        found = list(connection.execute(sa.text(query)))
    engine.dispose()
    return found


def test_chat_completions(client: openai.OpenAI, folder: Path) -> None:
    """Each line is answered as the endpoint would answer it, governed and recorded, and of low priority."""
    lines = [chat(f"good-{number}") for number in range(20)]
    lines[7:7] = [
        chat("nobody", model="nobody"),
        chat("streamed", stream=True),
        chat("long", max_tokens=100_000),
        chat("odd", colour="blue"),
    ]
    batch = ended(client, start(client, lines))
    assert (batch.status, batch.errors) == ("completed", None)
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (24, 20, 4)
    answers = lines_of(client, batch.output_file_id)
    assert list(answers) == [f"good-{number}" for number in range(20)]
    completions = [ChatCompletion.model_validate(line["response"]["body"]) for line in answers.values()]
    direct = client.chat.completions.create(**lines[0]["body"])
    assert {answer.choices[0].message.content for answer in completions} == {direct.choices[0].message.content}
    assert {answer.model for answer in completions} == {AGENT}
    assert batch.usage is not None
    assert batch.usage.output_tokens == 20 * 8
    errors = {
        name: (line["response"]["status_code"], line["response"]["body"]["error"]["code"])
        for name, line in lines_of(client, batch.error_file_id).items()
    }
    assert errors == {
        "nobody": (404, "unknown_agent"),
        "streamed": (422, "unsupported"),
        "long": (422, "prompt_too_long"),
        "odd": (422, "invalid_request"),
    }
    for name, kinds in (
        ("good-3", {"received", "admitted", "started", "completed"}),
        ("nobody", {"received", "failed"}),
    ):
        everything = {**answers, **lines_of(client, batch.error_file_id)}
        request_id = everything[name]["response"]["request_id"]
        events = rows(folder, f"SELECT kind FROM audit_events WHERE request_id = '{request_id}'")
        assert {event.kind for event in events} == kinds
    ids = ", ".join(f"'{line['response']['request_id']}'" for line in answers.values())
    stored = rows(folder, f"SELECT DISTINCT priority, deadline FROM requests WHERE request_id IN ({ids})")
    assert [row.priority for row in stored] == ["low"]
    assert stored[0].deadline is not None


def test_responses(client: openai.OpenAI) -> None:
    """The other endpoint; a line of the first is not one of its."""
    body = {"model": AGENT, "input": "What is on fire?", "max_output_tokens": 8}
    lines = [{"custom_id": f"r-{number}", "method": "POST", "url": RESPONSES, "body": body} for number in range(3)]
    batch = ended(client, start(client, lines, RESPONSES))
    assert batch.status == "completed", batch.errors
    answers = [
        Response.model_validate(line["response"]["body"]) for line in lines_of(client, batch.output_file_id).values()
    ]
    assert [answer.status for answer in answers] == ["incomplete"] * 3, "cut by max_output_tokens"
    assert all(answer.output_text for answer in answers)
    failed = ended(client, start(client, [*lines, chat("a")], RESPONSES))
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [(error.code, error.line) for error in failed.errors.data] == [("url_mismatch", 4)]


def test_the_example_of_the_docs(served: Served, tmp_path: Path) -> None:
    """docs/batches.md, run as it stands."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "batches.md").read_text("utf-8"), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, "utf-8")
    environment = {**os.environ, "GATEWAY": served.url, "KEY": served.key}
    ran = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split()[0] for line in ran.stdout.splitlines() if line.startswith(("api ", "disk "))] == [
        "api",
        "disk",
    ]


def test_cancelling(client: openai.OpenAI, folder: Path) -> None:
    """What is done is kept, and nothing of the batch goes on."""
    batch = start(client, [chat(f"c-{number}", max_tokens=400) for number in range(300)])
    wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", 60, "the batch to run")
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    told = [name for file in (batch.output_file_id, batch.error_file_id) if file for name in lines_of(client, file)]
    assert sorted(told) == sorted(f"c-{number}" for number in range(300))
    assert rows(folder, "SELECT 1 FROM requests WHERE state IN ('queued', 'running')") == []


def test_no_word_is_stored_in_the_open(client: openai.OpenAI, folder: Path) -> None:
    """Neither the lines nor the answers, anywhere beside the database or in it."""
    batch = ended(client, start(client, [chat("a")]))
    answer = lines_of(client, batch.output_file_id)["a"]["response"]["body"]["choices"][0]["message"]["content"]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert CANARY.encode() not in content, path
            assert answer.strip().encode() not in content, path
