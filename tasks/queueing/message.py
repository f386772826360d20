"""A job as a Celery message: small, signed, and encrypted where it carries text.

The message holds ids, epoch and hash in the open, for the queue to route and the worker to check, and the dynamic
part of the prompt and the sampling sealed with the request's data key. The profile's static part is not in it: the
worker has it by its hash. The signature covers every field, so that only a gateway can queue work.

The database keeps the sealed part, so that a request whose message Redis has lost can be published again, under a new
epoch, without knowing what is in it.

Where traces are recorded, it also says which one it belongs to. That has a signature of its own, over the message's name
as well: a release that does not know the field reads the message as ever. Where it is missing, or another's, only the
trace is lost.

The message is built in Celery's protocol 2, and `argsrepr`, which Celery logs and Flower shows, is the id alone.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import ValidationError

from tasks.crypto import DecryptionFailed, KeyWrapper, Signer, seal, unseal
from tasks.errors import MessageRejected
from tasks.job import Chain, Frozen, Job, Priority, Prompt, Sampling, ToolUse
from tasks.lifecycle import Republished
from tasks.prompts.packing import pack, unpack
from tasks.queueing.keys import FAMILY, HEAD_START_S, TASK_NAME, list_name

VERSION = 1
_SIGNED = ("v", "id", "epoch", "organization", "hash", "tokens", "published_at", "priority", "key", "sealed")


class _Wishes(Frozen):
    """The part of a job that says how to answer."""

    sampling: Sampling
    tools: ToolUse | None = None


@dataclass(frozen=True, slots=True)
class Queued:
    """A message, and what the queue has to know of it.

    `tag` is its name, `list` the list it waits in, `tokens` the length of its prompt, of which `static_tokens` are its
    profile's; `chain` are the segments that the profile may share with others. Its turn comes as if it had been published
    `head_start_s` earlier, in seconds.
    """

    tag: str
    list: str
    organization: str
    tokens: int
    head_start_s: float
    message: str = field(repr=False)
    static_tokens: int = 0
    chain: Chain = ()


class MessageCodec:
    """Writes and reads job messages. Gateway and workers share its secrets."""

    def __init__(self, signer: Signer, keys: KeyWrapper) -> None:
        self._signer = signer
        self._keys = keys

    def sealed(self, job: Job) -> bytes:
        """Return the secret part of the job's message, which is kept in SQL too. Each call gives another ciphertext."""
        wishes = _Wishes(sampling=job.sampling, tools=job.tools).model_dump_json(exclude_defaults=True).encode()
        secret = len(wishes).to_bytes(4, "big") + wishes + pack(job.prompt.dynamic_token_ids)
        return seal(job.data_key, secret, f"job:{job.request_id}")

    def encode(self, job: Job, wrapped_key: bytes, sealed: bytes | None = None, trace: str | None = None) -> Queued:
        """Return the message that asks a worker to run `job`, with the secret part that `sealed` gave for it, or a new one.

        `trace` is the context of the span that the worker's belong under.
        """
        return self._signed(
            {
                "v": VERSION,
                "id": job.request_id,
                "epoch": job.epoch,
                "organization": job.organization,
                "hash": job.prompt.static_profile_hash,
                "tokens": job.prompt.token_count,
                "published_at": job.published_at,
                "priority": job.priority,
                "key": _text(wrapped_key),
                "sealed": _text(self.sealed(job) if sealed is None else sealed),
            },
            trace,
            job.prompt.static_tokens,
            job.prompt.chain,
        )

    def again(self, request: Republished, trace: str | None = None) -> Queued:
        """Return the message of a request that is published once more, under its new epoch; what is sealed stays so.

        `trace` is as in `encode`; without it, the request's own is carried on.
        """
        return self._signed(
            {
                "v": VERSION,
                "id": request.request_id,
                "epoch": request.epoch,
                "organization": request.organization,
                "hash": request.static_profile_hash,
                "tokens": request.prompt_tokens,
                "published_at": request.published_at.timestamp(),
                "priority": request.priority,
                "key": _text(request.data_key),
                "sealed": _text(request.message),
            },
            trace or request.trace_context,
            request.static_tokens,
            request.chain,
        )

    def decode(self, envelope: Any) -> Job:
        """Return the job of an envelope. Raises MessageRejected if a gateway did not write it as it is."""
        try:
            if envelope["v"] != VERSION:
                raise MessageRejected("the message has another version")
            if not self._signer.verifies(_signed_content(envelope), _bytes(envelope["signature"])):
                raise MessageRejected("the message's signature is wrong")
            request_id = envelope["id"]
            data_key = self._keys.unwrap(_bytes(envelope["key"]), request_id)
            secret = unseal(data_key, _bytes(envelope["sealed"]), f"job:{request_id}")
            border = 4 + int.from_bytes(secret[:4], "big")
            wishes = _Wishes.model_validate_json(secret[4:border])
            prompt = Prompt(envelope["hash"], tuple(unpack(secret[border:])), envelope["tokens"])
            return Job(
                request_id=request_id,
                epoch=envelope["epoch"],
                organization=envelope["organization"],
                prompt=prompt,
                sampling=wishes.sampling,
                published_at=envelope["published_at"],
                data_key=data_key,
                tools=wishes.tools,
                priority=envelope["priority"],
                trace_context=self._trace(envelope),
            )
        except (KeyError, TypeError, ValueError, ValidationError, binascii.Error, DecryptionFailed) as error:
            raise MessageRejected(f"the message cannot be read: {type(error).__name__}") from None

    def _trace(self, envelope: Mapping[str, Any]) -> str | None:
        """Return the trace that the message belongs to, or None if no gateway said so."""
        if "trace" not in envelope:
            return None
        try:
            genuine = self._signer.verifies(_trace_content(envelope), _bytes(envelope["trace_signature"]))
        except (KeyError, TypeError, ValueError):
            return None
        return str(envelope["trace"]) if genuine else None

    def _signed(self, envelope: dict[str, Any], trace: str | None, static_tokens: int, chain: Chain) -> Queued:
        signature = _text(self._signer.sign(_signed_content(envelope)))
        if trace is not None:
            envelope["trace"] = trace
            envelope["trace_signature"] = _text(self._signer.sign(_trace_content(envelope)))
        priority = cast("Priority", envelope["priority"])
        return Queued(
            tag=delivery_tag(envelope["id"], envelope["epoch"]),
            list=list_name(envelope["hash"], priority),
            organization=envelope["organization"],
            tokens=envelope["tokens"],
            head_start_s=HEAD_START_S[priority],
            message=_celery_message({**envelope, "signature": signature}),
            static_tokens=static_tokens,
            chain=chain,
        )


def delivery_tag(request_id: str, epoch: int) -> str:
    """Return the name of a request's message: another publishing of the same request is another message."""
    return f"{request_id}:{epoch}"


def _celery_message(envelope: dict[str, Any]) -> str:
    request_id = envelope["id"]
    body = json.dumps([[envelope], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    message = {
        # As it is: kombu's usual base64 would make a third more of it.
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": TASK_NAME,
            "id": request_id,
            "root_id": request_id,
            "parent_id": None,
            "group": None,
            "retries": 0,
            "timelimit": [None, None],
            "eta": None,
            "expires": None,
            "argsrepr": request_id,
            "kwargsrepr": "{}",
            "ignore_result": True,
        },
        "properties": {
            "correlation_id": request_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": FAMILY, "routing_key": f"{FAMILY}.{envelope['hash']}"},
            "priority": 0,
            "delivery_tag": delivery_tag(request_id, envelope["epoch"]),
        },
    }
    return json.dumps(message, separators=(",", ":"))


def _signed_content(envelope: dict[str, Any]) -> bytes:
    return json.dumps([envelope[name] for name in _SIGNED], separators=(",", ":")).encode()


def _trace_content(envelope: Mapping[str, Any]) -> bytes:
    return json.dumps(["trace", *(envelope[name] for name in ("id", "epoch", "trace"))], separators=(",", ":")).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
