"""What the engine is asked, for requests and for the KV cache's own sake, and the salt that keeps organizations apart in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

from tasks.crypto import derive
from tasks.job import Job, Sampling
from worker_gpu.admission import Admission, Share
from worker_gpu.engines.base import Engine, GenerationRequest


def cache_salt_of(organization: str, secret: bytes) -> str:
    """Return what an organization's blocks are hashed with: a secret is in it, so that nobody finds another's."""
    return derive(secret, "cache-salt", organization).hex()


def generation_request(job: Job, attempt: int, static: Sequence[int], secret: bytes) -> GenerationRequest:
    """Return what the engine is asked for a job's so-many-th attempt; `static` are the token ids of its profile."""
    return GenerationRequest(
        request_id=f"{job.request_id}-{attempt}",
        prompt_token_ids=[*static, *job.prompt.dynamic_token_ids],
        sampling=job.sampling,
        cache_salt=cache_salt_of(job.organization, secret),
        tools=job.tools,
    )


def one_token(request_id: str, token_ids: Sequence[int], cache_salt: str) -> GenerationRequest:
    """Return what computes a prompt, or uses what is computed of it, at the price of a single token."""
    return GenerationRequest(request_id, list(token_ids), Sampling(max_tokens=1, seed=0), cache_salt)


async def run_unasked(
    engine: Engine,
    admission: Admission,
    request: GenerationRequest,
    cached_tokens: int,
    share: Share,
    freed: Callable[[], object],
) -> None:
    """Run what no client waits for, counted among what the worker has in hand, and call `freed` when it is not any more.

    `cached_tokens` of its prompt should be found in the KV cache. Raises what `Engine.generate` does.
    """
    loop = asyncio.get_running_loop()
    taken = admission.deliver(len(request.prompt_token_ids), cached_tokens, share)
    try:
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                admission.begin(taken, delta.cached_tokens, delta.prefill_s, loop.time())
    finally:
        admission.end(taken)
        freed()
