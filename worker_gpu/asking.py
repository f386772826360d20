"""What the engine is asked, and the salt that keeps organizations apart in its KV cache."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.crypto import derive
from tasks.job import Job
from worker_gpu.engines.base import GenerationRequest


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
