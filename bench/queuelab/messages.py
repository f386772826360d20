"""The messages that the compared queues are given: those of requests with 200 dynamic tokens."""

from __future__ import annotations

import random
import time
from itertools import count

from tasks.crypto import KEY_BYTES, KeyWrapper, Signer
from tasks.ids import new_request_id
from tasks.job import Job, Prompt, Sampling
from tasks.queueing.message import MessageCodec, Queued

#: How many are published, taken and finished at a time.
BLOCK = 200
TOKENS = 6_000


class Messages:
    """Messages as a gateway makes them: one is sealed for real, and the others are it under other names."""

    def __init__(self, seed: int) -> None:
        wrapper = KeyWrapper((b"m" * KEY_BYTES,))
        data_key, wrapped = wrapper.new_key("bench")
        chance = random.Random(seed)
        prompt = Prompt("0" * 64, tuple(chance.randrange(49_000) for _ in range(200)), TOKENS)
        job = Job(new_request_id(), 1, "acme", prompt, Sampling(seed=7), time.time(), data_key)
        self.sample = MessageCodec(Signer((b"s" * KEY_BYTES,)), wrapper).encode(job, wrapped)
        self._numbers = count()

    def new(self, list_number: int) -> Queued:
        """Return a message for the list of that number."""
        sample, tag = self.sample, f"{next(self._numbers):035}:1"
        message = sample.message.replace(sample.tag, tag)
        return Queued(tag, f"{list_number:064}", sample.organization, sample.tokens, 0, message)
