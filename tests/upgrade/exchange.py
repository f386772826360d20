"""What one release leaves for another to read: written by it, or read by it. Run by a test with either release on PYTHONPATH.

    python exchange.py write     prints one of everything that outlives a process, as JSON
    python exchange.py read      reads a list of that from standard input, and prints what it understood of each

Everything is as it lies in Redis or SQL: messages, their sealed part, frames, results, payloads, idempotency keys. The keys
are fixed, and so are the facts, so that a reader's words can be compared with the writer's.
"""

from __future__ import annotations

import base64
import dataclasses
import hmac
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tasks
from tasks.crypto import KEY_BYTES, KeyWrapper, Signer, derive, seal, unseal
from tasks.job import (
    Job,
    Piece,
    Prompt,
    ResponseFormat,
    Result,
    Sampling,
    TaskRequest,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    ToolUse,
    Usage,
)
from tasks.lifecycle import Republished
from tasks.queueing.message import MessageCodec
from tasks.stream import Cursor, Frame, completed, delta, ended, opening, replay

SIGNING, MASTER, PEPPER = (letter * KEY_BYTES for letter in (b"s", b"m", b"p"))
WRAPPER = KeyWrapper((MASTER,))
CODEC = MessageCodec(Signer((SIGNING,)), WRAPPER)
REQUEST_ID = "gw_0194f0a0b0c07d0e8f00112233445566"
#: What only a newer release may have filled in; an older one does not know the name.
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
AT = datetime(2026, 11, 26, 12, 0, 0, 125_000, tzinfo=UTC)

SAMPLING = Sampling(
    max_tokens=40,
    temperature=0.5,
    stop=("ende", "\n\n"),
    seed=2**62,
    n=2,
    logprobs=3,
    response_format=ResponseFormat(type="json_schema", json_schema={"type": "object", "title": "ü"}),
)
TOOLS = ToolUse(tools=({"type": "function", "function": {"name": "reboot"}},), choice="required", parallel=False)
TASK = TaskRequest(
    api="responses",
    agent="prüfer",
    messages=({"role": "user", "content": "What now? 😀"},),
    tools=TOOLS,
    sampling=SAMPLING,
    metadata={"team": "blue"},
    priority="high",
    deadline=AT,
    asked={"input": "What now? 😀"},
)
PIECES = (
    Piece(text="It is "),
    Piece(text="the disk", choice=1, logprobs=(TokenLogprob(token=" disk", logprob=-0.5, top=((" cpu", -1.5),)),)),  # noqa: S106  a word, no secret
    Piece(tool_calls=(ToolCallDelta(index=0, id="call_1", name="reboot", arguments='{"host": '),)),
)
RESULT = Result(
    pieces=PIECES,
    finish_reasons=("tool_calls", "length"),
    model="tiny",
    usage=Usage(prompt_tokens=700, cached_tokens=650, output_tokens=9),
    timings=Timings(queued_ms=1.5, prefill_ms=None, first_token_ms=12.25, total_ms=80.0),
)


def write() -> dict[str, Any]:
    """Return one of everything."""
    data_key, wrapped = WRAPPER.new_key(REQUEST_ID)
    job = Job(
        request_id=REQUEST_ID,
        epoch=3,
        organization="acme",
        prompt=Prompt("ab" * 32, tuple(range(60_000, 60_050)), 700),
        sampling=SAMPLING,
        published_at=AT.timestamp(),
        data_key=data_key,
        tools=TOOLS,
        priority="high",
    )
    sealed = CODEC.sealed(job)
    row = Republished(REQUEST_ID, 4, "acme", "ab" * 32, 700, "high", wrapped, sealed, AT)
    traced = {"trace": TRACE} if "trace" in CODEC.encode.__code__.co_varnames else {}
    frames = [
        opening(1),
        *(delta(Cursor(1, n), piece) for n, piece in enumerate(PIECES, 1)),
        completed(Cursor(1, 4), RESULT),
    ]
    frames += [opening(2), ended(2, "failed", "engine_failed")]
    secret = derive(PEPPER, "idempotency", "")
    return {
        "wrapped": _text(wrapped),
        "queued": [
            dataclasses.asdict(CODEC.encode(job, wrapped, sealed, **traced)),
            dataclasses.asdict(CODEC.again(row)),
        ],
        "column": _text(sealed),
        "frames": [[str(frame.cursor), _text(frame.seal(data_key, REQUEST_ID))] for frame in frames],
        "result": _text(seal(data_key, RESULT.model_dump_json(exclude_defaults=True).encode(), f"result:{REQUEST_ID}")),
        "payload": _text(seal(data_key, TASK.model_dump_json(exclude_defaults=True).encode(), f"payload:{REQUEST_ID}")),
        "idempotency": [_text(hmac.digest(secret, content, "sha256")) for content in (b"key-1", b"{}")],
    }


def read(left: dict[str, Any]) -> dict[str, Any]:
    """Return what was understood, in words that do not depend on the release."""
    data_key = WRAPPER.unwrap(_bytes(left["wrapped"]), REQUEST_ID)
    jobs = []
    for queued in left["queued"]:
        job = dataclasses.asdict(CODEC.decode(json.loads(json.loads(queued["message"])["body"])[0][0]))
        job.pop("trace_context", None)
        job["sampling"], job["tools"] = job["sampling"].model_dump(), job["tools"].model_dump()
        jobs.append({**job, "data_key": job["data_key"] == data_key, "list": queued["list"], "tag": queued["tag"]})
    frames = [Frame.unseal(data_key, REQUEST_ID, Cursor.parse(at), _bytes(sealed)) for at, sealed in left["frames"]]
    result = Result.model_validate_json(unseal(data_key, _bytes(left["result"]), f"result:{REQUEST_ID}"))
    task = TaskRequest.model_validate_json(unseal(data_key, _bytes(left["payload"]), f"payload:{REQUEST_ID}"))
    secret = derive(PEPPER, "idempotency", "")
    return {
        "jobs": jobs,
        "column": len(unseal(data_key, _bytes(left["column"]), f"job:{REQUEST_ID}")),
        "frames": [[str(frame.cursor), frame.event, frame.data] for frame in frames],
        "replayed": [[str(frame.cursor), frame.event, frame.data] for frame in replay(1, result)],
        "result": result.model_dump(),
        "task": task.model_dump(mode="json"),
        "idempotency": left["idempotency"]
        == [_text(hmac.digest(secret, content, "sha256")) for content in (b"key-1", b"{}")],
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


if __name__ == "__main__":
    content = [write()] if sys.argv[1] == "write" else list(map(read, json.load(sys.stdin)))
    json.dump({"release": str(Path(tasks.__file__).parents[1]), "content": content}, sys.stdout)
