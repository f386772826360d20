"""An attempt as a span, and the engine's part in it as one of its own, in OpenTelemetry's words for generative models.

The attempt's span continues the trace that the message names, below the span that published it. It cannot be told of by a
worker that is killed. So whoever begins the next attempt tells of the lost one too, from the record: when it began, and where.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Row

from tasks import tracing
from tasks.job import Job
from tasks.lifecycle import WORKER_LOST, Attempt
from tasks.tracing import UNRECORDED, Span
from tasks.tracing.messaging import PROCESS, processing
from worker_gpu.answer import Answer


def attempt_span(job: Job, tag: str) -> Span:
    """Begin the span of whatever becomes of one message."""
    span = tracing.begin(PROCESS, "consumer", job.trace_context)
    if span.recording:
        span.set(
            {
                **processing(tag),
                "metaqore.request.id": job.request_id,
                "metaqore.organization": job.organization,
                "metaqore.epoch": job.epoch,
            }
        )
    return span


def begun(attempt: Attempt, waited_s: float) -> None:
    """Note in the current span which attempt it is, and for how many seconds its message waited."""
    if (span := tracing.current()).recording:
        span.set(
            {
                "metaqore.attempt": attempt.number,
                "metaqore.worker": attempt.worker or "",
                "metaqore.queue.wait_ms": round(max(0.0, waited_s) * 1000, 3),
            }
        )


def lost(job: Job, tag: str, number: int, started: Row[Any]) -> None:
    """Tell of the attempt before, whose worker was lost; `started` is the event of its beginning."""
    span = tracing.begin(
        PROCESS,
        "consumer",
        job.trace_context,
        {
            **processing(tag),
            "metaqore.request.id": job.request_id,
            "metaqore.organization": job.organization,
            "metaqore.attempt": number,
            "metaqore.worker": started.worker or "",
        },
        started.occurred_at.timestamp(),
    )
    span.fail(WORKER_LOST)
    span.end()


def became(outcome: str, code: str | None = None, *, excused: bool = False) -> None:
    """Note in the current span what became of the request, and the code of what went wrong.

    It is no failure where nobody wanted an answer any more, or where an attempt was `excused`.
    """
    if (span := tracing.current()).recording:
        span.set({"metaqore.outcome": outcome})
        if code is not None:
            span.set({"metaqore.error.code": code})
            if outcome not in ("cancelled", "expired") and not excused:
                span.fail(code)


def engine_span(job: Job, model: str, engine: str) -> Span:
    """Begin the span of what the engine does for a job."""
    if not tracing.current().recording:
        return UNRECORDED
    sampling = job.sampling
    asked: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": engine,
        "gen_ai.request.model": model,
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
    }
    if sampling.n > 1:
        asked["gen_ai.request.choice.count"] = sampling.n
    return tracing.span(f"chat {model}", asked)


def generated(span: Span, answer: Answer, model: str, asked_at: float) -> None:
    """Note in the engine's span what it said so far, in figures. `asked_at` is in seconds since the Unix epoch."""
    if not span.recording:
        return
    usage = answer.usage
    span.set(
        {
            "gen_ai.response.model": model,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.response.finish_reasons": [reason for _, reason in sorted(answer.finish_reasons.items())],
        }
    )
    if (first_token_at := answer.first_token_at) is not None:
        span.event("first token", first_token_at)
        span.set({"gen_ai.response.time_to_first_chunk": round(max(0.0, first_token_at - asked_at), 6)})
