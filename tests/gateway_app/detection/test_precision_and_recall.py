"""How much of each kind is found, and how much of what is found is there, on a labelled set that is made from a seed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway_app.detection import KINDS, Detector
from tests.gateway_app.detection.labelled import NEGATIVES, negatives, positives
from tests.gateway_app.detection.values import POSITIVES

SEED, POSITIVES_A_KIND, NEGATIVES_A_FAMILY = 20261125, 200, 100
#: The least that either figure may be. Kinds whose form proves nothing by itself are given a little room.
FLOOR, ROOMY_FLOOR = 0.98, 0.95
ROOMY = {"phone", "named_secret", "email"}
PAGE = Path(__file__).parents[3] / "docs" / "detection.md"


@dataclass
class Score:
    """Counts over the whole set, by kind."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def precision(self, kind: str) -> float:
        """Return which part of what was found is there."""
        return self.right[kind] / max(1, self.right[kind] + self.wrong[kind])

    def recall(self, kind: str) -> float:
        """Return which part of what is there was found."""
        return self.right[kind] / max(1, self.right[kind] + self.missed[kind])


@pytest.fixture(scope="module")
def score() -> Score:
    """Return how the detector does on the set."""
    detector, made = Detector(), Score()
    for sample in (*positives(SEED, POSITIVES_A_KIND), *negatives(SEED, NEGATIVES_A_FAMILY)):
        found, wanted = Counter(detector.scan([sample.text]).counts), Counter([sample.kind] if sample.kind else [])
        made.right += found & wanted
        made.wrong += found - wanted
        made.missed += wanted - found
        if found != wanted:
            made.examples.append(f"{sample.family}: {dict(found)} in {sample.text!r}")
    return made


def test_the_set_has_every_kind() -> None:
    """A kind without samples would have no figures."""
    assert set(POSITIVES) == set(KINDS)
    assert len(NEGATIVES) > 25


@pytest.mark.parametrize("kind", KINDS)
def test_precision_and_recall(score: Score, kind: str) -> None:
    """Both are at least what the page promises."""
    precision, recall = score.precision(kind), score.recall(kind)
    print(f"seed {SEED}: {kind:16} precision {precision:.3f} recall {recall:.3f}")
    floor = ROOMY_FLOOR if kind in ROOMY else FLOOR
    assert precision >= floor, score.examples
    assert recall >= floor, score.examples


def test_the_page_shows_these_figures(score: Score) -> None:
    """The table of the page has every kind with its class, and the figures of this very set."""
    page = PAGE.read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .* \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {(kind, data_class) for kind, data_class, *_ in rows} == set(KINDS.items())
    assert str(SEED) in page
    for kind, _, precision, recall in rows:
        # A release of `phonenumbers` may change an example number, and a figure by a sample or two.
        assert float(precision) == pytest.approx(score.precision(kind), abs=0.011), kind
        assert float(recall) == pytest.approx(score.recall(kind), abs=0.011), kind
