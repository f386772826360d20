"""E-mail addresses and telephone numbers.

An address is found by its `@`, then its domain forwards and its name backwards. A number is found in three ways: by a
plus sign, by one of the forms in which people write numbers of their own country, or after a word such as `phone`;
there any grouping will do. In each case its digits must be a number that is given out (see phones).
"""

from __future__ import annotations

import re

from gateway_app.detection.phones import is_calling_code, is_international, is_national, is_north_american
from gateway_app.detection.rule import Rule, Span, digits_of, shape_rule, shortened

_MAX_NAME = 64
_MIN_AFTER_DOT = 8
_NAME_BACKWARDS = re.compile(rb"[0-9A-Za-z._%+'-]{1,64}")
#: What a name may hold and does not begin with; it is read backwards.
_NOT_FIRST = b"._%+'-"
#: What follows the last dot of a file's name, as in `image@2x.png`, and is no top-level domain.
_FILES = frozenset(b"png jpg jpeg gif svg webp js css py html json yaml yml md txt lock whl gz zip".split())
_EMAIL = re.compile(
    rb"@(?<=[0-9A-Za-z_%+-]@)"
    rb"((?:[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?\.){1,8}[A-Za-z]{2,24})(?![0-9A-Za-z_(]|-[0-9A-Za-z])"
)
_INTERNATIONAL = re.compile(rb"\+(?<![0-9A-Za-z_+=]\+)([1-9](?:[ ()./-]{0,2}[0-9]){6,15})(?![0-9A-Za-z_]|[.:][0-9])")
#: Shapes in which numbers that begin with a 0 are written in France, Great Britain and Germany.
_ZERO_SHAPES = (
    b"00 00 00 00 00", b"00.00.00.00.00", b"00-00-00-00-00",
    b"000 0000 0000", b"0000 000 0000", b"00000 000000", b"00000 000 000",
    b"000 0000000", b"0000 0000000", b"000 00000000", b"0000 00000000",
    b"000/0000000", b"0000/0000000", b"000/00000000", b"0000/00000000", b"0000-0000000", b"000-00000000",
    b"(000) 0000 0000", b"(0000) 000 0000", b"(00000) 000000", b"(000) 0000000", b"(000) 00000000", b"(0000) 0000000",
)  # fmt: skip
_NORTH_AMERICAN_SHAPES = (
    b"000-000-0000", b"0-000-000-0000", b"000.000.0000", b"(000) 000-0000", b"(000)000-0000", b"(000) 000 0000",
)  # fmt: skip
#: Other numbers beside one make it part of a list or of a hexadecimal dump.
_NOT_BEFORE, _NOT_AFTER = (b"0 ", b"0a "), (b" 00", b" 0a", b" a0")
#: Words before a number of any grouping.
_WORDS = (b"phone", b"tel", b"mobil", b"cell", b"fax", b"call", b"dial", b"whatsapp", b"handy", b"sms", b"movil",
          b"portable", b"reach", b"text")  # fmt: skip


def _email(plain: bytes, match: re.Match[bytes]) -> Span | None:
    at, end = match.span()
    name = _NAME_BACKWARDS.match(plain[max(0, at - _MAX_NAME) : at][::-1])
    written = name[0].rstrip(_NOT_FIRST) if name else b""
    if not written or match[1].rpartition(b".")[2].lower() in _FILES:
        return None
    start = at - len(written)
    if plain[start - 1 : start] in {b":", b"/"} and b"://" in plain[max(0, start - 100) : start].split()[-1]:
        return None  # The user or password of a URL.
    if written == b"tig" and plain[end : end + 1] == b":":
        return None  # A git repository's address.
    return start, end


def _international(found: bytes) -> bool:
    code, dot, rest = found.partition(b".")
    # `+1.2125550123` is how registries write a number; `+35.898847` is a latitude and `+35236450.6` an amount.
    if dot and code.isdigit() and not (is_calling_code(code.decode()) and len(rest) >= _MIN_AFTER_DOT):
        return False
    return is_international(digits_of(found))


def _national(found: bytes) -> bool:
    return is_national(digits_of(found))


def _with_zero(found: bytes) -> bool:
    return found.lstrip(b"(").startswith(b"0") and _national(found)


def _north_american(found: bytes) -> bool:
    return is_north_american(digits_of(found))


def _word_rule(word: bytes) -> Rule:
    pattern = (
        word + rb"(?<![a-z]" + word + rb")(?:s|e|ed|ing|efon|ephone|phone)?(?![a-z])"
        rb"(?:[ _-]?(?:number|num|no|nr|phone|home|work|n)(?![a-z])\.?)?[^0-9a-z\n(+]{0,6}"
        rb"(?:(?:is|at|on|me|us|him|her|them|under|number|to|my|his|our|or)[^0-9a-z\n(+]{1,3}){0,3}"
        rb"(\(?[0-9](?:[ ()./-]{0,2}[0-9]){7,14})(?![0-9a-z_]|[.:/-][0-9])"
    )
    return Rule("phone", "lower", word, re.compile(pattern), shortened(_national), word)


RULES: tuple[Rule, ...] = (
    Rule("email", "plain", b"@", _EMAIL, _email, b"@"),
    Rule("phone", "plain", b"+", _INTERNATIONAL, shortened(_international), b"+"),
    *(_word_rule(word) for word in _WORDS),
    *sorted(
        (
            *(shape_rule("phone", shape, _with_zero, before=_NOT_BEFORE, after=_NOT_AFTER) for shape in _ZERO_SHAPES),
            *(
                shape_rule("phone", shape, _north_american, before=_NOT_BEFORE, after=_NOT_AFTER)
                for shape in _NORTH_AMERICAN_SHAPES
            ),
        ),
        key=lambda found: found.gate,
    ),
)
