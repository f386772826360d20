"""What the worker asks of a model engine.

An engine batches by itself: every request is handed over as soon as it arrives, and `generate` streams that
request's text while others run beside it. All methods are called on one asyncio loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.job import FinishReason, Sampling, TokenLogprob, ToolCallDelta, ToolUse
from worker_gpu.engines.kv_events import Subscriber

#: No step of a model on an accelerator takes so many seconds.
STALL_S = 8.0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine can hold: context window in tokens, sequences at once, KV block size in tokens.

    `cache_tokens` is what all blocks of the accelerator's KV cache hold together, 0 where the engine does not tell.
    """

    max_model_len: int
    max_num_seqs: int
    block_size: int
    cache_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do, as of its last step: sequences that run, and that wait for room.

    `kv_usage` is the share of the KV cache that running sequences hold, 0 to 1, None where the engine does not tell.
    `preemptions` counts the sequences that lost their blocks to others since the start.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float | None = None
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class TierRates:
    """Tokens a second that come back from the tiers below the GPU's cache: host RAM, and disk by way of it; 0: no such tier."""

    ram: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to run.

    `prompt_token_ids` is the whole prompt. `cache_salt` keeps organizations' prefix caches apart; it is derived by
    the gateway and never the client's. `request_id` must be unique among running requests. With `tools`, what the
    model says is parsed for calls of them.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    cache_salt: str
    tools: ToolUse | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What was added to one choice since its last delta; `text` may be empty while a character's bytes are incomplete.

    `output_tokens` counts all tokens of all choices so far. `cached_tokens` (prompt tokens found in the KV cache) and
    `prefill_s` (seconds from scheduling to first token, None where the engine cannot tell) are known from the first
    delta on. `finish_reason` is set on the last delta of each choice only.
    """

    text: str
    output_tokens: int
    cached_tokens: int
    prefill_s: float | None
    finish_reason: FinishReason | None
    choice: int = 0
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Engine(Protocol):
    """A running model."""

    @property
    def limits(self) -> EngineLimits:
        """Return the engine's limits; valid once started."""
        ...

    @property
    def steps(self) -> int:
        """Return how many steps the engine has computed. While it is busy, a number that stays means that it hangs."""
        ...

    @property
    def load(self) -> EngineLoad:
        """Return what the engine has to do. Any thread may ask."""
        ...

    @property
    def tier_rates(self) -> TierRates:
        """Return how fast the tiers below the GPU's cache are. Any thread may ask."""
        ...

    @property
    def busy(self) -> bool:
        """Tell whether the engine itself has requests."""
        ...

    @property
    def stall_s(self) -> float:
        """Return how many seconds without a step mean that, where the operator does not say."""
        ...

    async def start(self) -> None:
        """Load the model and become ready. Raises ConfigurationError for bad settings, EngineDead if it cannot run."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Run one request; the deltas of its `sampling.n` choices come mixed. Closing it early aborts it.

        Raises PromptTooLong if there is no room for an answer, Unsupported if the engine cannot do what is asked (a
        schema it cannot follow), EngineFailed if this request failed, EngineDead if the engine did.
        """
        ...

    def block_hashes(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        """Return the hashes by which the engine's KV events name the full blocks of a prompt; valid once started.

        They are none where the engine does not tell of its blocks, or names them by what only it knows.
        """
        ...

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with every KV event from now on, on the engine's loop."""
        ...

    def tell_again(self) -> None:
        """Have KV events tell what the cache holds to somebody who missed some: all of it, or what prompts find of it."""
        ...

    async def check_health(self) -> None:
        """Raise EngineDead if the engine no longer runs."""
        ...

    async def stop(self) -> None:
        """Free the model and end every process the engine started."""
        ...
