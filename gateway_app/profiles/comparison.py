"""How two versions of a profile differ: segment by segment, each as a unified diff.

Segments are matched within their kind, so that one that was put in is not taken for changes of all that follow it.
Comparing lines can take time that grows with the square of their number, or worse, and whoever writes profiles chooses
the lines. So what both begin and end with is set aside first, and of what is left only so many pairs of lines are
compared in one answer; text beyond that is shown as replaced whole, which is as true and merely longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from typing import Literal, get_args

from tasks.prompts.profile import Profile, SegmentKind

#: Pairs of lines that are compared for one answer: about a second in the worst case.
MAX_LINE_PAIRS = 250_000
_CONTEXT_LINES = 3
Opcode = tuple[str, int, int, int, int]


@dataclass(frozen=True, slots=True)
class SegmentChange:
    """One segment that differs. Its places among all segments are counted from 0; None where it is not there."""

    kind: SegmentKind
    change: Literal["added", "removed", "changed"]
    old_index: int | None
    new_index: int | None
    lines_added: int
    lines_removed: int
    diff: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The segments that differ, in order. `shared_segments` are equal at the start, and share their KV cache.

    `inheritance_changed` tells that the versions do not extend the same, or only one is abstract.
    """

    changes: tuple[SegmentChange, ...]
    shared_segments: int
    description_changed: bool
    inheritance_changed: bool = False


def compare(old: Profile, new: Profile) -> Comparison:
    """Return what was changed from `old` to `new`."""
    budget = _Budget(MAX_LINE_PAIRS)
    changes = [change for kind in get_args(SegmentKind) for change in _of_kind(old, new, kind, budget)]
    both = zip(old.segments, new.segments, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    inheritance = (old.extends, old.abstract) != (new.extends, new.abstract)
    return Comparison(tuple(changes), shared, old.description != new.description, inheritance)


@dataclass(slots=True)
class _Budget:
    """Pairs of lines that may still be compared."""

    left: int

    def spend(self, pairs: int) -> bool:
        """Take as much, and tell whether there was enough."""
        enough = pairs <= self.left
        self.left -= pairs if enough else 0
        return enough


def _of_kind(old: Profile, new: Profile, kind: SegmentKind, budget: _Budget) -> Iterator[SegmentChange]:
    before, after = (
        [(index, segment.text) for index, segment in enumerate(profile.segments) if segment.kind == kind]
        for profile in (old, new)
    )
    matcher = SequenceMatcher(None, [text for _, text in before], [text for _, text in after], autojunk=False)
    for tag, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        if tag == "equal":
            continue
        for offset in range(max(old_end - old_start, new_end - new_start)):
            left = before[old_start + offset] if old_start + offset < old_end else None
            right = after[new_start + offset] if new_start + offset < new_end else None
            yield _change(kind, left, right, budget)


def _change(
    kind: SegmentKind, left: tuple[int, str] | None, right: tuple[int, str] | None, budget: _Budget
) -> SegmentChange:
    old, new = (_lines(side[1]) if side else [] for side in (left, right))
    opcodes = _opcodes(old, new, budget)
    names = tuple(f"{kind} {side[0]}" if side else "nothing" for side in (left, right))
    different = [opcode for opcode in opcodes if opcode[0] != "equal"]
    return SegmentChange(
        kind=kind,
        change="added" if left is None else "removed" if right is None else "changed",
        old_index=left[0] if left else None,
        new_index=right[0] if right else None,
        lines_added=sum(new_end - new_start for _, _, _, new_start, new_end in different),
        lines_removed=sum(old_end - old_start for _, old_start, old_end, _, _ in different),
        diff="".join((f"--- {names[0]}\n+++ {names[1]}\n", *_hunks(opcodes, old, new))),
    )


def _lines(text: str) -> list[str]:
    """Return the lines with their ends. A line ends with a line feed alone: other ends are text."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def _opcodes(old: list[str], new: list[str], budget: _Budget) -> list[Opcode]:
    """Return how to get from `old` to `new`, as difflib says it."""
    shortest = min(len(old), len(new))
    head = next((index for index in range(shortest) if old[index] != new[index]), shortest)
    rest = shortest - head
    tail = next((index for index in range(rest) if old[-1 - index] != new[-1 - index]), rest)
    middle_old, middle_new = old[head : len(old) - tail], new[head : len(new) - tail]
    if budget.spend(len(middle_old) * len(middle_new)):
        middle = SequenceMatcher(None, middle_old, middle_new, autojunk=False).get_opcodes()
    else:
        middle = [("replace", 0, len(middle_old), 0, len(middle_new))]
    found: list[Opcode] = [("equal", 0, head, 0, head)] if head else []
    found += [(tag, *(place + head for place in places)) for tag, *places in middle]  # type: ignore[misc]
    if tail:
        found.append(("equal", len(old) - tail, len(old), len(new) - tail, len(new)))
    return found


def _hunks(opcodes: list[Opcode], old: list[str], new: list[str]) -> Iterator[str]:
    matcher = _Known(opcodes)
    for group in matcher.get_grouped_opcodes(_CONTEXT_LINES):
        first, last = group[0], group[-1]
        yield f"@@ -{_range(first[1], last[2])} +{_range(first[3], last[4])} @@\n"
        for tag, old_start, old_end, new_start, new_end in group:
            if tag == "equal":
                yield from (_shown(" ", line) for line in old[old_start:old_end])
                continue
            yield from (_shown("-", line) for line in old[old_start:old_end])
            yield from (_shown("+", line) for line in new[new_start:new_end])


class _Known(SequenceMatcher[str]):
    """difflib's grouping into hunks, of opcodes that are known already."""

    def __init__(self, opcodes: list[Opcode]) -> None:
        super().__init__(None, "", "")
        self.opcodes = opcodes


def _range(start: int, end: int) -> str:
    # As in every unified diff: an empty range is named by the line before it.
    length = end - start
    return str(start + 1) if length == 1 else f"{start + 1 if length else start},{length}"


def _shown(sign: str, line: str) -> str:
    return sign + line if line.endswith("\n") else f"{sign}{line}\n\\ No newline at end of file\n"
