"""What the engine says to one request, gathered while it is streamed."""

from __future__ import annotations

import time
from collections.abc import Callable

from tasks.job import FinishReason, Job, Result, Timings, Usage
from tasks.metrics import worker as metrics
from worker_gpu.engines.base import Delta
from worker_gpu.request_stream import RequestStream


class Answer:
    """One attempt's answer so far. `taken_at` is when the worker took the message, in seconds since the Unix epoch.

    `begun` is called with the delta of the first token.
    """

    def __init__(
        self, job: Job, stream: RequestStream, model: str, taken_at: float, begun: Callable[[Delta], None]
    ) -> None:
        self.stream = stream
        self.finish_reasons: dict[int, FinishReason] = {}
        #: When the first token came, in seconds since the Unix epoch.
        self.first_token_at: float | None = None
        self._job = job
        self._model = model
        self._taken_at = taken_at
        self._begun = begun
        self._last: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Take the engine's next delta, and stream what it says."""
        if self.first_token_at is None and delta.output_tokens:
            self.first_token_at = at = time.time()
            metrics.begun(
                self._job.priority,
                prompt_tokens=self._job.prompt.token_count,
                cached_tokens=delta.cached_tokens,
                waited_s=self._taken_at - self._job.published_at,
                first_token_s=at - self._job.published_at,
                prefill_s=delta.prefill_s,
            )
            self._begun(delta)
        self.stream.write(delta)
        if delta.finish_reason is not None:
            self.finish_reasons[delta.choice] = delta.finish_reason
        self._last = delta

    @property
    def usage(self) -> Usage:
        """Return how many tokens there were so far."""
        last = self._last
        return Usage(
            prompt_tokens=self._job.prompt.token_count,
            cached_tokens=last.cached_tokens if last else 0,
            output_tokens=last.output_tokens if last else 0,
        )

    def result(self, state: str) -> Result:
        """Return all of it, with its figures; where it was stopped early, no choice counts as finished."""
        self.stream.cut()
        job, last = self._job, self._last
        since = job.published_at
        metrics.ANSWERED.labels(state).observe(max(0.0, time.time() - since))
        return Result(
            pieces=tuple(self.stream.pieces),
            finish_reasons=tuple(reason for _, reason in sorted(self.finish_reasons.items()))
            if state == "completed"
            else (),
            model=self._model,
            usage=self.usage,
            timings=Timings(
                queued_ms=_milliseconds(since, self._taken_at),
                prefill_ms=None if last is None or last.prefill_s is None else round(last.prefill_s * 1000, 3),
                first_token_ms=None if self.first_token_at is None else _milliseconds(since, self.first_token_at),
                total_ms=_milliseconds(since, time.time()),
            ),
        )


def _milliseconds(start: float, end: float) -> float:
    """Return the time between two instants in seconds; clocks of two hosts may differ by a little."""
    return round(max(0.0, end - start) * 1000, 3)
