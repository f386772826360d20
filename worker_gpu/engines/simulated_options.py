"""What can be set of the simulation, and how long a step takes.

A step runs the model once over everything that is scheduled. It takes

    step_s + step_s_per_sequence * sequences scheduled + prompt tokens computed / prefill_tokens_per_s

The defaults stand for an 8B model in bfloat16 on one H100; docs/simulation.md derives them and names the sources.

For load tests `tokens_per_s_per_sequence` paces every stream instead: a sequence gets a token each period, however
many others run. Two things make that hold. A step costs nothing per sequence, and it computes only as many prompt
tokens as fit half a period, so that no token comes a whole period late: at worst, half a period passes before the
next step begins and half of one before it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from worker_gpu.engines.simulated_faults import Fault

#: Reading 8.03e9 weights of 2 bytes at 3.35 TB/s takes 4.8 ms, whatever the batch.
STEP_S = 0.005
#: Reading 100 MB of keys and values: 770 tokens of context at 128 KiB each.
STEP_S_PER_SEQUENCE = 0.000_03
#: 400 TFLOP/s of the 989 that the data sheet promises.
PREFILL_TOKENS_PER_S = 25_000.0
#: Of 92 % of 80 GB, what 16 GB of weights and 6 GB of activations leave, at 2 MiB a block of 16 tokens.
NUM_BLOCKS = 24_576

Tokens = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long steps take, in seconds. `period_s` is the time between a stream's tokens, or 0 if it is not paced.

    `prompt_limit` is the number of prompt tokens that one step may compute, or None.
    """

    step_s: float
    per_sequence_s: float
    per_prompt_token_s: float
    period_s: float
    prompt_limit: int | None

    def seconds(self, sequences: int, prompt_tokens: int) -> float:
        """Return the duration of a step that schedules so many sequences and computes so many prompt tokens."""
        return self.step_s + self.per_sequence_s * sequences + self.per_prompt_token_s * prompt_tokens


class SimulationOptions(BaseModel):
    """Options of the simulated engine. Sizes are in tokens, blocks or sequences, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_num_seqs: int = Field(default=64, ge=1, description="Sequences that run at once; each choice is one.")
    max_model_len: int = Field(default=8192, ge=2, description="Context window. What all blocks hold bounds it, too.")
    max_batch_tokens: int = Field(default=8192, ge=1, description="Tokens computed in one step.")
    long_prefill_token_threshold: int = Field(
        default=0, ge=0, description="Tokens of one prompt computed in one step; 0 is as many as fit."
    )
    block_size: int = Field(default=16, ge=1, description="Tokens a KV block holds.")
    num_blocks: int = Field(default=NUM_BLOCKS, ge=1, description="KV blocks in all.")
    prefix_caching: bool = True
    step_s: float = Field(default=STEP_S, ge=0)
    step_s_per_sequence: float = Field(default=STEP_S_PER_SEQUENCE, ge=0)
    prefill_tokens_per_s: float = Field(default=PREFILL_TOKENS_PER_S, gt=0)
    tokens_per_s_per_sequence: float | None = Field(
        default=None, gt=0, description="Paces each stream, whatever the batch."
    )
    time_scale: float = Field(default=1.0, ge=0, description="Stretches all times; 0 is as fast as possible.")
    answer_tokens: Tokens | tuple[Tokens, Tokens] = Field(
        default=(24, 320), description="Answers' length: fixed, or evenly between two bounds."
    )
    faults: tuple[Fault, ...] = Field(default=(), description="What goes wrong, and when; see Fault.")

    @field_validator("answer_tokens")
    @classmethod
    def _in_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("the lower bound comes first")
        return value

    @property
    def context_window(self) -> int:
        """Return the longest sequence, in tokens: a single one must fit into the blocks, or it would wait for ever."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def answer_bounds(self) -> tuple[int, int]:
        """Return the shortest and the longest answer, in tokens."""
        answer = self.answer_tokens
        return answer if isinstance(answer, tuple) else (answer, answer)

    @property
    def step_time(self) -> StepTime:
        """Return how long steps take, stretched by `time_scale`."""
        scale, rate = self.time_scale, self.prefill_tokens_per_s
        if self.tokens_per_s_per_sequence is None:
            return StepTime(self.step_s * scale, self.step_s_per_sequence * scale, scale / rate, 0.0, None)
        period_s = 1 / self.tokens_per_s_per_sequence
        step_s = min(self.step_s, period_s / 4)
        prompt_limit = max(1, int((period_s / 2 - step_s) * rate))
        return StepTime(step_s * scale, 0.0, scale / rate, period_s * scale, prompt_limit)

    @property
    def slowest_step_s(self) -> float:
        """Return how long it takes at most from one step to the next, in seconds."""
        time = self.step_time
        return max(time.period_s, time.seconds(self.max_num_seqs, self.max_batch_tokens))
