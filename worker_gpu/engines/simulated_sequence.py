"""A request as the simulated engine sees it: a sequence of tokens for each choice, the whole answer known beforehand."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.errors import PromptTooLong, Unsupported
from tasks.job import FinishReason
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.block_hashes import TOKEN_BYTES, as_bytes, chain_start, extend_chain
from worker_gpu.engines.simulated_answer import Answer, make_answer
from worker_gpu.engines.simulated_options import SimulationOptions


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request, with what the engine has done for it; only the batch changes it.

    `hashes` are those of all full blocks of prompt and answer, and `length` is the answer's, in tokens. `computed` counts the tokens with keys and values in
    `blocks`, of which the first `stored` are in the cache; `said` counts tokens of the answer. `cached_tokens`,
    `scheduled_at` and `first_token_at` tell of the first admission. No step that begins before `due` gives it a token.
    """

    request: GenerationRequest
    choice: int
    answer: Answer
    hashes: list[bytes]
    prompt_tokens: int
    length: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    stored: int = 0
    said: int = 0
    cached_tokens: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    due: float = -math.inf


class Token(NamedTuple):
    """One token of a sequence's answer, by its position."""

    sequence: Sequence
    position: int

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return how the sequence ended, if this was its last token."""
        return self.sequence.answer.finish_reason if self.position == self.sequence.length - 1 else None


def make_sequences(request: GenerationRequest, options: SimulationOptions) -> list[Sequence]:
    """Return a request's sequences, one a choice; like vLLM's, choice i has the seed of the request plus i.

    Raises PromptTooLong if no token could be added to the prompt, Unsupported if a real model would be needed.
    """
    prompt, sampling, block_size = request.prompt_token_ids, request.sampling, options.block_size
    room = min(sampling.max_tokens, options.context_window - len(prompt))
    if room < 1:
        raise PromptTooLong()
    if sampling.response_format is not None:
        raise Unsupported("response_format: the simulated engine runs no model that could follow one")
    if request.tools is not None and request.tools.choice != "auto":
        raise Unsupported(
            "tool_choice: the simulated engine runs no model that could call a tool; only auto is possible"
        )
    tokens = as_bytes(prompt)
    digest = hashlib.sha256(tokens).digest()
    start = chain_start(request.cache_salt)
    hashes = extend_chain(start, tokens, block_size)
    rest = tokens[len(hashes) * block_size * TOKEN_BYTES :]
    sequences = []
    for choice in range(sampling.n):
        answer = make_answer(digest, (sampling.seed or 0) + choice, options.answer_bounds, room, sampling.stop)
        further = extend_chain(hashes[-1] if hashes else start, rest + as_bytes(answer.token_ids), block_size)
        sequences.append(Sequence(request, choice, answer, hashes + further, len(prompt), len(answer.texts)))
    return sequences
