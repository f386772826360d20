"""One text seen four ways, byte for byte in the same places, so that a match in one is a span in all.

- `plain` is the text in ASCII. Digits of any script, full-width characters, and the many kinds of spaces and hyphens
  become the ASCII ones they stand for, letters lose their accents, and characters that nobody sees (zero-width spaces,
  soft hyphens) are dropped, since they hide a number from a machine and not from a reader. Any other character becomes
  a question mark, which is no part of a word. Nothing grows: a text cannot be made to cost more by its spelling.
- `lower` is the same in lower case, for words that may be written either way.
- `shape` has `a` for every letter and `0` for every digit: what a number looks like, whatever its digits are.

JSON's escapes are undone as far as they would glue a word to what stands before it (a line feed written as a backslash and an n) or hide a quotation
mark, since a context reaches the model, and this module, as JSON.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

ViewName = Literal["plain", "lower", "shape"]

#: Stands between two texts. No pattern matches across it.
_BETWEEN = "\n\x00\n"
#: Beyond it are rare ideographs, private characters and the tags.
_LAST_OF_INTEREST = 0x1FFFF
#: A second ASCII that no reader sees and a model may read. What is written in it is scanned like any other text.
_TAGS = range(0xE0000, 0xE0080)
_SHAPES = bytes(
    ord("0") if chr(code) in "0123456789" else ord("a") if code < 128 and chr(code).isalpha() else code  # noqa: PLR2004
    for code in range(256)
)
_ESCAPES = (
    (b"\\n", b"\n"),
    (b"\\r", b"\r"),
    (b"\\t", b"\t"),
    (b'\\"', b'"'),
    (b"\\'", b"'"),
    (b"\\/", b"/"),
)
#: Bullets stand for hidden characters.
_STANDS_FOR = {"\N{MINUS SIGN}": "-", "\N{BULLET}": "*", "\N{BLACK CIRCLE}": "*"}
#: Dashes, spaces, and what formats text without being seen.
_BY_CATEGORY = {"Pd": "-", "Zs": " ", "Cf": ""}


@dataclass(frozen=True, slots=True)
class Views:
    """The views of some texts, joined."""

    plain: bytes
    lower: bytes
    shape: bytes

    @classmethod
    def of(cls, texts: Iterable[str]) -> Views:
        """Return the views of `texts`, in their order. Anything that is a str is taken, lone surrogates too."""
        text = _BETWEEN.join(texts)
        if not text.isascii():
            text = text.translate(_ascii_table())
        plain = text.encode("ascii", "replace")
        if b"\\" in plain:
            for escape, meant in _ESCAPES:
                plain = plain.replace(escape, meant)
        # E-mail addresses in the query of a logged URL.
        plain = plain.replace(b"%40", b"@")
        return cls(plain, plain.lower(), plain.translate(_SHAPES))

    def get(self, name: ViewName) -> bytes:
        """Return the view of that name."""
        return self.lower if name == "lower" else self.shape if name == "shape" else self.plain


@functools.cache
def _ascii_table() -> Mapping[int, str | None]:
    """Return what each character is replaced by: one ASCII character, or None for those that are dropped."""
    found = ((code, _in_ascii(chr(code))) for code in (*range(128, _LAST_OF_INTEREST + 1), *_TAGS))
    return {code: meant or None for code, meant in found if meant is not None}


def _in_ascii(character: str) -> str | None:
    """Return the ASCII character that this one stands for, "" if it is not to be seen, None if it stands for none."""
    if ord(character) in _TAGS:
        tagged = chr(ord(character) - _TAGS.start)
        return tagged if tagged.isprintable() else ""
    if character in _STANDS_FOR:
        return _STANDS_FOR[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.digit(character))
    if category in _BY_CATEGORY:
        return _BY_CATEGORY[category]
    meant = unicodedata.normalize("NFKD", character) if unicodedata.decomposition(character) else ""
    meant = "".join(part for part in meant if not unicodedata.combining(part))
    return meant if len(meant) == 1 and meant.isascii() else None
