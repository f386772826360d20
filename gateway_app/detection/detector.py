"""Finds private and sensitive data in text: views of it, then each rule in turn.

Rules go from the most special to the most general, and what one has found is taken: a JSON web token after `Bearer` is
one finding, not two, and the digits inside an IBAN are not a card. Time grows with the length of the text and with
what is found in it, which is counted no further than MAX_COUNT a kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from gateway_app.detection import cards, contacts, keys, named_secrets, national_ids
from gateway_app.detection.findings import Findings
from gateway_app.detection.phones import prepare
from gateway_app.detection.rule import Rule
from gateway_app.detection.views import Views

#: More of a kind than this are not counted: they change no decision, and a text of nothing else would cost much.
MAX_COUNT = 1000


class Detector:
    """Scans texts. Has no state, so that threads may share one; making it takes some tenths of a second."""

    def __init__(self) -> None:
        rules: tuple[Rule, ...] = (
            *keys.RULES,
            *named_secrets.RULES,
            *cards.IBAN_RULES,
            *national_ids.CONTEXT_RULES,
            *cards.CARD_RULES,
            *national_ids.SHAPE_RULES,
            *contacts.RULES,
        )
        #: Rules in their order, those that follow each other and have a gate in common together.
        self._groups = tuple(
            (view, gate, tuple(group))
            for (view, gate), group in groupby(rules, key=lambda rule: (rule.view, rule.gate))
        )
        prepare()
        self.scan(["\N{NO-BREAK SPACE}"])

    def scan(self, texts: Iterable[str]) -> Findings:
        """Return what is in the texts, which are looked at as one after the other. Never raises for any str."""
        views = Views.of(texts)
        taken = bytearray()
        counts: dict[str, int] = {}
        for name, gate, rules in self._groups:
            view = views.get(name)
            if gate not in view:
                continue
            for rule in rules:
                if rule.anchor in view:
                    taken = taken or bytearray(len(view))
                    _apply(rule, view, views.plain, taken, counts)
        return Findings(counts)


def _apply(rule: Rule, view: bytes, plain: bytes, taken: bytearray, counts: dict[str, int]) -> None:
    """Count what the rule finds that no rule before has taken, and take it: `taken` has a 1 for each such byte."""
    for match in rule.pattern.finditer(view):
        span = rule.locate(plain, match)
        if span is None or taken.find(1, *span) >= 0:
            continue
        start, end = span
        taken[start:end] = b"\x01" * (end - start)
        counts[rule.kind] = counts.get(rule.kind, 0) + 1
        if counts[rule.kind] >= MAX_COUNT:
            return
