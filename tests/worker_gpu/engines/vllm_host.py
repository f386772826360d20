"""The real engine on a loop of its own, for tests that ask it something and wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tasks.job import Sampling, TokenLogprob, ToolUse
from worker_gpu.cache import CacheIndex
from worker_gpu.engines.base import Delta, GenerationRequest
from worker_gpu.engines.vllm import VllmEngine

WAIT_S = 240.0
PROMPT = [10 + index * 7 % 400 for index in range(100)]
T = TypeVar("T")


class Host:
    """An engine with the permanent event loop it needs, in a thread of its own, and an index of its cache."""

    def __init__(self, engine: VllmEngine) -> None:
        """Start the loop, not the engine."""
        self.engine = engine
        self.cache = CacheIndex(engine, 3600)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Awaitable[T]) -> T:
        """Run a coroutine on the engine's loop and wait for it."""

        async def bounded() -> T:
            return await asyncio.wait_for(work, WAIT_S)

        return asyncio.run_coroutine_threadsafe(bounded(), self.loop).result()

    def ask(self, prompt: list[int] = PROMPT, **changes: Any) -> list[Delta]:
        """Run one request to its end."""
        return self.run(collect(self.engine.generate(request(prompt, **changes))))

    def answers(self, tools: ToolUse | None = None, **sampling: Any) -> list[Said]:
        """Run one request to its end; return what each choice said."""
        return said(self.ask(tools=tools, **sampling))

    def check(self, work: Callable[[VllmEngine], Awaitable[None]]) -> None:
        """Run `work` with the engine on its loop."""
        self.run(work(self.engine))

    def close(self) -> None:
        """End the loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@dataclass
class Said:
    """All that one choice said. `calls` holds id, name and arguments of each, in the order of their numbers."""

    text: str = ""
    calls: list[list[str]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


def request(
    prompt: list[int] = PROMPT,
    *,
    name: str = "id",
    salt: str = "salt",
    tools: ToolUse | None = None,
    **sampling: Any,
) -> GenerationRequest:
    """Return a request for 32 tokens of a fixed seed, unless told otherwise."""
    return GenerationRequest(name, prompt, Sampling(**{"max_tokens": 32, "seed": 1, **sampling}), salt, tools)


async def collect(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    """Read to the end."""
    return [delta async for delta in deltas]


def text(deltas: list[Delta]) -> str:
    """Return what the deltas say together."""
    return "".join(delta.text for delta in deltas)


def said(deltas: list[Delta]) -> list[Said]:
    """Return what each choice says. A call's first part has its id and name, and no other does."""
    choices = [Said() for _ in range(max(delta.choice for delta in deltas) + 1)]
    for delta in deltas:
        choice = choices[delta.choice]
        assert choice.finish_reason is None, "a finished choice went on"
        choice.text += delta.text
        choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason
        for call in delta.tool_calls:
            if call.index == len(choice.calls):
                assert call.id is not None
                assert call.name is not None
                choice.calls.append([call.id, call.name, call.arguments])
            else:
                assert (call.id, call.name) == (None, None), "a call was named twice"
                choice.calls[call.index][2] += call.arguments
    return choices
