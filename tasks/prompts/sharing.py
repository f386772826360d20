"""Where the segments of a profile end, in token ids: up to there its prompts are those of every profile that shares them.

A token may reach over the end of a segment, and which one does depends on what follows. So an end is found by trying: the
segments up to it are encoded with nothing after them, with more text, and with an example; what all of these begin with
is what the segments give by themselves. Nothing else of the profile goes into it, so profiles that share segments find
the same end and the same ids. A profile whose own ids differ before that end, as one could whose next segment joins in a
way that no trial showed, has no end there: what is said to be shared is shared, token by token.

Only the last characters of a text take part in the trials: what follows a text does not change how its beginning is
encoded. Were a tokenizer to do that, its profiles would be found to differ, and share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from tasks.prompts.beginning import Beginning
from tasks.prompts.tokenizer import ModelTokenizer, TemplateRefused

#: The segments of a profile whose ends are looked for: they travel with every message. Most have three or four in all.
MAX_ENDS = 16
TAIL_CHARACTERS = 1000
#: How another segment of text may begin (tasks/prompts/profile.py joins them by a blank line).
_MORE_TEXT = ("\n\nx", "\n\n x")
_EXAMPLE = ("x", "x")
Said = tuple[str | None, Sequence[tuple[str, str]]]


def segment_ends(tokenizer: ModelTokenizer, inner: Sequence[Said], static_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return for each of `inner` how many of `static_token_ids` all profiles have in common that begin so; 0 for none.

    Each of `inner` is what a profile says up to the end of a segment that another follows: its text and its examples. An
    end that is not beyond the one before it is 0 too.
    """
    ends, last = [], 0
    for text, examples in inner:
        ids = _common_ids(tokenizer, text, examples)
        end = len(ids) if list(static_token_ids[: len(ids)]) == ids else 0
        ends.append(end if last < end < len(static_token_ids) else 0)
        last = max(last, ends[-1])
    return tuple(ends)


def _common_ids(tokenizer: ModelTokenizer, text: str | None, examples: Sequence[tuple[str, str]]) -> list[int]:
    """Return the ids that every profile begins with whose first segments say this."""
    ids = Beginning(tokenizer, text, examples).token_ids
    tail = None if text is None else text[-TAIL_CHARACTERS:]
    tails = [(user[-TAIL_CHARACTERS:], assistant[-TAIL_CHARACTERS:]) for user, assistant in examples]
    trials: list[Said] = [(tail, [*tails, _EXAMPLE])]
    if tail is not None and not tails:
        trials += [(tail + more, ()) for more in _MORE_TEXT]
    alone = Beginning(tokenizer, tail, tails).token_ids
    kept = len(alone)
    for trial in trials:
        try:
            kept = min(kept, _common_length(alone, Beginning(tokenizer, *trial).token_ids))
        except TemplateRefused:
            continue  # Then no profile can go on like this.
    return ids[: max(0, len(ids) - (len(alone) - kept))]


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
