"""What one release leaves in Redis and SQL, the other reads: messages, stored messages, frames, results, payloads, keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.crypto import Signer
from tests.upgrade import exchange
from tests.workers import ROOT

SCRIPT = Path(__file__).with_name("exchange.py")


def run(release: Path, what: str, *given: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the script with a release's code; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what],
        input=json.dumps(given), env={**os.environ, "PYTHONPATH": str(release)}, cwd=release,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert Path(found["release"]) == release.resolve(), "another release ran"
    content: list[dict[str, Any]] = found["content"]
    return content


@pytest.fixture(scope="module")
def left(old_release: Path) -> list[dict[str, Any]]:
    """Return what each release leaves, that before first."""
    return [*run(old_release, "write"), *run(ROOT, "write")]


@pytest.mark.parametrize("reader", ["old", "new"])
def test_it_is_read(left: list[dict[str, Any]], old_release: Path, reader: str) -> None:
    """Each understands what the other meant, to the last field."""
    read = run(old_release if reader == "old" else ROOT, "read", *left)
    assert len(read) == len(left)
    for understood in read:
        _is_what_was_meant(understood)


def _is_what_was_meant(understood: dict[str, Any]) -> None:
    result = exchange.RESULT.model_dump(mode="json")
    assert understood["result"] == result
    assert understood["task"] == exchange.TASK.model_dump(mode="json")
    assert understood["idempotency"] is True
    assert understood["replayed"] == understood["frames"][:5]
    assert [event for _, event, _ in understood["frames"]] == [
        *("started", "delta", "delta", "delta", "completed"),
        *("reset", "failed"),
    ]
    assert [job["epoch"] for job in understood["jobs"]] == [3, 4]
    for job in understood["jobs"]:
        assert job["sampling"] == exchange.SAMPLING.model_dump(mode="json")
        assert job["tools"] == exchange.TOOLS.model_dump(mode="json")
        # Where the queue's message has it from; in the message itself it is not.
        assert job["prompt"].pop("chain", []) == []
        assert job["prompt"] == {
            "static_profile_hash": "ab" * 32,
            "dynamic_token_ids": list(range(60_000, 60_050)),
            "token_count": 700,
        }
        assert (job["data_key"], job["priority"], job["organization"]) == (True, "high", "acme")
        assert (job["list"], job["tag"]) == ("ab" * 32 + ":high", f"{exchange.REQUEST_ID}:{job['epoch']}")
        assert job["published_at"] == exchange.AT.timestamp()


def test_a_reader_that_needs_another_form_is_found(left: list[dict[str, Any]], old_release: Path) -> None:
    """The control: a message of another version, signed as it should be, is one that the release before refuses."""
    message = json.loads(left[1]["queued"][0]["message"])
    body = json.loads(message["body"])
    envelope = body[0][0]
    envelope["v"] = 2
    names = ("v", "id", "epoch", "organization", "hash", "tokens", "published_at", "priority", "key", "sealed")
    signed = json.dumps([envelope[name] for name in names], separators=(",", ":")).encode()
    envelope["signature"] = exchange._text(Signer((exchange.SIGNING,)).sign(signed))
    message["body"] = json.dumps(body)
    other = {**left[1], "queued": [{**left[1]["queued"][0], "message": json.dumps(message)}]}
    with pytest.raises(AssertionError, match="another version"):
        run(old_release, "read", other)
