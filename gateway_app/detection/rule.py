"""A rule: how one form of one kind is found, cheaply where it is not there and exactly where it is.

Nearly every text holds nearly none of the kinds. So a rule names an anchor, some bytes that each match holds, and a
text without them is done with in one search in C. Rules whose anchors have a part in common name it as their gate; the
detector looks for that first, and a text without it is done with all of them. Only where the anchor is, the pattern
runs. Its repetitions are bounded, so that no text makes it try more than a fixed number of bytes at any place. What
matches is a candidate, and goes to a check: a checksum, a table of issuers, a list of placeholders.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gateway_app.detection.views import ViewName

#: Where in the text something was found: start and end, as slices have them.
Span = tuple[int, int]
#: Says where in `plain` the candidate is that a match points to, or None if it is none after all.
Locate = Callable[[bytes, re.Match[bytes]], Span | None]
Check = Callable[[bytes], bool]

#: What shapes have in common.
_GATES = (b"0 0", b"0-0", b"0.0")
_HEAD = re.compile(rb"[^0a]*[0a]+")


@dataclass(frozen=True, slots=True)
class Rule:
    """One form of one kind. `pattern` is searched for in the view named `view`, if `gate` and `anchor` are in it."""

    kind: str
    view: ViewName
    anchor: bytes
    pattern: re.Pattern[bytes]
    locate: Locate
    gate: bytes


def rule(
    kind: str, view: ViewName, anchor: bytes, pattern: bytes, check: Check | None = None, gate: bytes | None = None
) -> Rule:
    """Return a rule whose candidate is the pattern's first group, or all of it if it has none."""
    compiled = re.compile(pattern)
    group = 1 if compiled.groups else 0

    def locate(plain: bytes, match: re.Match[bytes]) -> Span | None:
        start, end = match.span(group)
        return (start, end) if check is None or check(plain[start:end]) else None

    return Rule(kind, view, anchor, compiled, locate, gate or anchor)


def shape_rule(
    kind: str, shape: bytes, check: Check, *, before: tuple[bytes, ...] = (), after: tuple[bytes, ...] = ()
) -> Rule:
    """Return the rule for one shape, such as `000-00-0000`, that no longer word, number or fraction contains.

    `before` and `after` are more shapes that may not stand there.
    """
    head = _HEAD.match(shape)
    assert head is not None  # noqa: S101  a shape without digits is a mistake in this package
    first, more, rest = re.escape(shape[:1]), re.escape(head[0][1:]), re.escape(shape[head.end() :])
    never_before = [rb"[0a_]", rb"0[.,:/-]", rb"a-", *map(re.escape, before)]
    never_after = [rb"[0a_]", rb"[.,:/-]0", rb"-a", *map(re.escape, after)]
    # Only the first group is used up: what follows may be the beginning of the real one.
    whole = b"".join(rb"(?<!" + left + first + rb")" for left in never_before)
    pattern = first + whole + more + rb"(?=" + rest + rb"(?!" + b"|".join(never_after) + rb"))"
    length = len(shape)

    def locate(plain: bytes, match: re.Match[bytes]) -> Span | None:
        start = match.start()
        return (start, start + length) if check(plain[start : start + length]) else None

    gate = next((gate for gate in _GATES if gate in shape), shape)
    return Rule(kind, "shape", shape, re.compile(pattern), locate, gate)


def shortened(check: Check) -> Locate:
    """Return a Locate that takes the pattern's last group, or as much of it as passes when groups at its end are left.

    Numbers of any grouping do not tell where they end: `+44 20 7946 0958 2 lines` may seem to have two digits more.
    """

    def locate(plain: bytes, match: re.Match[bytes]) -> Span | None:
        start, end = match.span(match.re.groups)
        for _ in range(3):
            if check(plain[start:end]):
                return start, end
            end = plain.rfind(b" ", start, end)
            if end < 0:
                return None
        return None

    return locate


def digits_of(found: bytes) -> str:
    """Return the digits alone, without what separates them."""
    return found.translate(None, b" \t-./()+").decode("ascii")


def text_check(check: Callable[[str], bool]) -> Check:
    """Return a check of bytes from one of text, as the libraries have them."""
    return lambda found: check(found.decode("ascii"))
