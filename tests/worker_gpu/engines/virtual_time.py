"""Time that passes only when somebody waits for it: for a batch alone, and for all that runs on an asyncio loop."""

from __future__ import annotations

import asyncio
import math
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple

from tasks.job import FinishReason, Sampling
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.simulated_batch import ContinuousBatch
from worker_gpu.engines.simulated_options import SimulationOptions

#: A hundred tokens: six full blocks of 16, and 4 tokens more.
PROMPT = list(range(100, 200))


class Said(NamedTuple):
    """One token, with the time at which it was there, in seconds."""

    at: float
    request_id: str
    choice: int
    text: str
    finish_reason: FinishReason | None


def serve(
    batch: ContinuousBatch,
    arrivals: Iterable[tuple[float, GenerationRequest]],
    after_step: Callable[[float], None] = lambda _: None,
) -> list[Said]:
    """Run all requests to their ends; `arrivals` are (time, request), in order. `after_step` is told each step's end."""
    waiting, now = deque(arrivals), 0.0
    said: list[Said] = []
    while True:
        due = max(now, batch.due_at())
        if waiting and waiting[0][0] <= due:
            arrived, request = waiting.popleft()
            now = max(now, arrived)
            batch.add(request)
        elif due == math.inf:
            return said
        else:
            step = batch.step(due)
            now = due + step.seconds
            for token in step.tokens:
                sequence = token.sequence
                text = sequence.answer.texts[token.position]
                said.append(Said(now, sequence.request.request_id, sequence.choice, text, token.finish_reason))
            after_step(now)


def batch_of(**options: Any) -> ContinuousBatch:
    """Return an idle batch."""
    return ContinuousBatch(SimulationOptions(**options))


def request(name: str, prompt: list[int] = PROMPT, *, salt: str = "salt", **sampling: Any) -> GenerationRequest:
    """Return a request."""
    return GenerationRequest(name, prompt, Sampling(**{"seed": 1, "max_tokens": 400, **sampling}), salt)


def times(said: list[Said], name: str, choice: int = 0) -> list[float]:
    """Return when the tokens of one choice were there."""
    return [token.at for token in said if (token.request_id, token.choice) == (name, choice)]


def text(said: list[Said], name: str, choice: int = 0) -> str:
    """Return what one choice said."""
    return "".join(token.text for token in said if (token.request_id, token.choice) == (name, choice))


class _ImpatientSelector(selectors.DefaultSelector):
    """Does not wait, and says for how long it should have."""

    def __init__(self, passed: Callable[[float], None]) -> None:
        super().__init__()
        self._passed = passed

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self._passed(max(0.0, timeout))
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose sleeps take no time, and `overshoot_s` seconds too long on its own clock."""

    def __init__(self, overshoot_s: float = 0.0) -> None:
        self.now = 0.0
        self._overshoot_s = overshoot_s
        super().__init__(_ImpatientSelector(self._pass))

    def time(self) -> float:
        return self.now

    def _pass(self, seconds: float) -> None:
        if seconds:
            self.now += seconds + self._overshoot_s


def run_virtually(coroutine: Coroutine[Any, Any, None], overshoot_s: float = 0.0) -> None:
    """Do as asyncio.run does, on a VirtualLoop."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(overshoot_s)) as runner:
        runner.run(coroutine)
