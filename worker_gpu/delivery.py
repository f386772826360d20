"""Reading what the queue delivers: Celery's message around our envelope, which nobody has verified yet.

Whatever is in a message, reading it ends in one of two ways: a delivery, or MessageRejected with a few words that
repeat nothing of it. Of Celery's headers only the task's name is looked at; `eta`, `expires`, `retries`, callbacks and their
kin mean nothing here. Why the queue gave the message to this worker comes with it, if that can be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tasks.errors import MessageRejected
from tasks.queueing import decision
from tasks.queueing.decision import MOST_TOKENS, Decision
from tasks.queueing.keys import TASK_NAME
from tasks.queueing.properties import decision_of, lease_tag, record_of, returns_of
from tasks.queueing.qos import is_ours
from worker_gpu.admission import NOBODY, Share


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that was leased to this process.

    `tag` is its name, `record` the message as Redis has it, `came_back` how often it was given back before. `envelope`
    is to be verified. `decision` tells why this worker has it, if it is known.
    """

    tag: str
    record: bytes = field(repr=False)
    came_back: int
    envelope: dict[str, Any] = field(repr=False)
    decision: Decision | None = None

    @property
    def prompt_tokens(self) -> int:
        """Return the length of the prompt, as the envelope says it; 0 if that cannot be."""
        tokens = self.envelope.get("tokens")
        return tokens if isinstance(tokens, int) and 0 < tokens <= MOST_TOKENS else 0

    @property
    def cached_tokens(self) -> int:
        """Return how many of its tokens should be found in the KV cache."""
        return self.decision.predicted_tokens if self.decision else 0

    @property
    def share(self) -> Share:
        """Return whose it is and with what profile, as far as the queue said so."""
        if self.decision is None:
            return NOBODY
        winner = self.decision.winner
        return Share(self.decision.organization or "", winner.static_profile_hash, winner.static)


def tag_of(message: Any) -> str | None:
    """Return the lease tag of a message, or None if it is none of our queue's: nothing is leased then."""
    tag = getattr(message, "delivery_tag", None)
    return lease_tag(tag) if isinstance(tag, str) and is_ours(tag) else None


def read(message: Any) -> Delivery:
    """Return the delivery of one of our queue's messages. Raises MessageRejected if it is not one for this task."""
    tag = tag_of(message)
    if tag is None:
        raise MessageRejected("the message is not of this queue")
    try:
        name = message.headers["task"]
        arguments, *_ = message.decode()
        (envelope,) = arguments
        if not isinstance(envelope, dict):
            raise TypeError
    except Exception as error:  # the message may be anything, and so may what reading it raises
        raise MessageRejected(f"the message cannot be read: {type(error).__name__}") from None
    if name != TASK_NAME:
        raise MessageRejected("the message asks for an unknown task")
    return Delivery(tag, record_of(message), returns_of(message), envelope, decision.read(decision_of(message)))
