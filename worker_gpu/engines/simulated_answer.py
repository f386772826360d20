"""What the simulated model says: words that mean nothing, the same ones for the same question.

An answer is a pure function of the prompt's token ids and the seed, not of the salt, the engine's load or the Python
that runs it: a retry gives the same text anywhere. A digest of both is stretched with SHAKE-128 to one byte a token,
so that a shorter answer to the same prompt is a prefix of a longer one. The byte picks the word, and how likely the
word is said to have been.

Since the whole answer is known beforehand, text need not be held back while it may yet turn out to be the beginning
of a stop string, as a real engine must.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.job import FinishReason, TokenLogprob

PHRASE = (
    "the queue holds each request until one worker takes it and streams its answer back in order , "
    "without losing a word ."
)
#: All different, and more than the 20 alternatives a request may ask for. A token's id is its place in here.
WORDS = PHRASE.split()
TEXTS = [f"{word} " for word in WORDS]
LEAST_LIKELY, LIKELIER_BY = 0.4, 0.05
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, token by token. `texts` are what each token adds to the text; `finish_reason` is how it ends."""

    draws: bytes
    texts: list[str]
    finish_reason: FinishReason

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens' ids."""
        return [draw % len(WORDS) for draw in self.draws]

    def logprob(self, index: int, alternatives: int) -> TokenLogprob:
        """Return how likely a token was, and the most likely ones in its place; it is the first of them."""
        likelihood, word = divmod(self.draws[index], len(WORDS))
        chance = LEAST_LIKELY + LIKELIER_BY * likelihood
        # Each further one has half of what is left, so that all together stay below 1.
        chances = [chance, *((1 - chance) / 2**rank for rank in range(1, alternatives))]
        top = tuple((TEXTS[(word + rank) % len(WORDS)], math.log(p)) for rank, p in enumerate(chances))
        return TokenLogprob(token=TEXTS[word], logprob=math.log(chance), top=top[:alternatives])


def make_answer(prompt_digest: bytes, seed: int, bounds: tuple[int, int], room: int, stop: Sequence[str]) -> Answer:
    """Return the answer to a prompt.

    It ends by itself at a length between `bounds`, in tokens, or at the first of the `stop` strings, of which it
    keeps nothing; or it is cut off after `room` tokens.
    """
    source = hashlib.shake_128(prompt_digest + b"%d" % seed)
    shortest, longest = bounds
    number = int.from_bytes(source.digest(_LENGTH_BYTES), "little")
    length = shortest + number % (longest - shortest + 1)
    draws = source.digest(_LENGTH_BYTES + min(length, room))[_LENGTH_BYTES:]
    texts = [TEXTS[draw % len(WORDS)] for draw in draws]
    text = "".join(texts)
    found = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
    if not found:
        return Answer(draws, texts, "stop" if length <= room else "length")
    ended, cut = min(found)
    kept, position = [], 0
    for piece in texts:
        kept.append(piece[: max(0, cut - position)])
        position += len(piece)
        if position >= ended:
            break
    return Answer(draws[: len(kept)], kept, "stop")
