"""Payment cards and bank accounts: numbers with a checksum, an issuer and a length.

A card is a run of digits, or the groups that are embossed on one with the same separator throughout. Its first digits
must be those of an issuer whose cards have as many digits, and Luhn's sum must be right: one in ten of such numbers is
so by chance. An IBAN has its country's structure and its check digits, in either case, with or without spaces.
"""

from __future__ import annotations

import re
from string import ascii_uppercase

from stdnum import iban, numdb

from gateway_app.detection.rule import Rule, Span, rule, shape_rule

#: By first digit: the first digits of each issuer, as ranges of equally long prefixes, and how long its cards are.
_ISSUERS: dict[bytes, tuple[tuple[bytes, bytes, frozenset[int]], ...]] = {
    b"2": (
        (b"2221", b"2720", frozenset({16})),  # Mastercard
        (b"2200", b"2204", frozenset({16, 17, 18, 19})),  # Mir
    ),
    b"3": (
        (b"34", b"34", frozenset({15})),  # American Express
        (b"37", b"37", frozenset({15})),
        (b"300", b"305", frozenset({14, 16})),  # Diners Club
        (b"36", b"36", frozenset({14, 16})),
        (b"38", b"39", frozenset({14, 16})),
        (b"3528", b"3589", frozenset({16, 19})),  # JCB
    ),
    b"4": ((b"4", b"4", frozenset({13, 16, 19})),),  # Visa
    b"5": (
        (b"51", b"55", frozenset({16})),  # Mastercard
        (b"508", b"508", frozenset({16})),  # RuPay
        (b"5018", b"5018", frozenset({13, 15, 16, 19})),  # Maestro
        (b"5020", b"5020", frozenset({13, 15, 16, 19})),
        (b"5038", b"5038", frozenset({13, 15, 16, 19})),
        (b"5893", b"5893", frozenset({13, 15, 16, 19})),
    ),
    b"6": (
        (b"6011", b"6011", frozenset({16, 19})),  # Discover
        (b"644", b"659", frozenset({16, 19})),
        (b"62", b"62", frozenset({16, 17, 18, 19})),  # UnionPay
        (b"60", b"60", frozenset({16})),  # RuPay
        (b"6304", b"6304", frozenset({13, 15, 16, 19})),  # Maestro
        (b"6759", b"6763", frozenset({13, 15, 16, 19})),
    ),
    b"8": ((b"81", b"82", frozenset({16})),),  # RuPay
}
#: What a digit adds to Luhn's sum, and what every second one from the right does.
_ONCE = bytes(max(0, code - 48) for code in range(256))
_TWICE = bytes(max(0, (code - 48) * 2 // 10 + (code - 48) * 2 % 10) if 48 <= code < 58 else 0 for code in range(256))  # noqa: PLR2004
_GROUPS = ((4, 4, 4, 4), (4, 4, 4, 4, 3), (4, 6, 5), (4, 6, 4))
_SHORTEST, _LONGEST = 13, 19
_RUN = b"0" * _SHORTEST


def _is_card(found: bytes) -> bool:
    issuers = _ISSUERS.get(found[:1])
    if issuers is None:
        return False
    digits = found.translate(None, b" -.")
    issued = any(low <= digits[: len(low)] <= high and len(digits) in lengths for low, high, lengths in issuers)
    return issued and _luhn(digits) and len(set(digits)) > 1


def _luhn(digits: bytes) -> bool:
    """Tell whether Luhn's sum is right. Digits alone cost a log much time, so this is not the library's, which is slower."""
    return (sum(digits[::-2].translate(_ONCE)) + sum(digits[-2::-2].translate(_TWICE))) % 10 == 0


CARD_RULES: tuple[Rule, ...] = (
    rule(
        "credit_card",
        "shape",
        _RUN,
        rb"0(?<![0a_+]0)(?<!0[.,]0)(?<![0a]-0)0{%d,%d}+(?![0a_]|[.,-]0|-a)" % (_SHORTEST - 1, _LONGEST - 1),
        _is_card,
    ),
    *(
        # Neither five groups of four nor the end of a bank account is a card.
        shape_rule(
            "credit_card",
            separator.join(b"0" * length for length in lengths),
            _is_card,
            before=(b"0000" + separator, b"aa00" + separator),
            after=(separator + b"0000",),
        )
        for lengths in _GROUPS
        for separator in (b" ", b"-", b".")
    ),
)


def _ibans() -> dict[bytes, re.Pattern[bytes]]:
    """Return what an IBAN of each country looks like, from the registry that the library carries."""
    characters = {"n": rb"[0-9]", "a": rb"[A-Za-z]", "c": rb"[0-9A-Za-z]"}
    registry = numdb.get("iban")
    found = {}
    for code in (first + second for first in ascii_uppercase for second in ascii_uppercase):
        structure = registry.info(code)[0][1].get("bban")
        if structure:
            parts = re.findall(r"([0-9]+)!([nac])", structure)
            account = b"".join(rb"(?:[ -]?%b){%d}" % (characters[kind], int(count)) for count, kind in parts)
            found[code.encode()] = re.compile(rb"[A-Za-z]{2}[0-9]{2}" + account + rb"(?![0-9A-Za-z_])")
    return found


_IBANS = _ibans()


def _iban(plain: bytes, match: re.Match[bytes]) -> Span | None:
    start = match.start()
    account = _IBANS.get(plain[start : start + 2].upper())
    found = account and account.match(plain, start)
    return found.span() if found and iban.is_valid(found[0].decode(), check_country=False) else None


_IBAN = re.compile(rb"aa00(?<![0a_]aa00)(?=[ 0a-])")
IBAN_RULES: tuple[Rule, ...] = (Rule("iban", "shape", b"aa00", _IBAN, _iban, b"aa00"),)
