"""What a scan costs: under a millisecond for 2 KB, in step with length, and no text that is much worse than others.

Times are of the processor and the least of several runs, since other tests run beside this one.
"""

from __future__ import annotations

import random
import time

import pytest

from bench.detection import HOSTILE, ORDINARY, hostile
from gateway_app.detection import Detector

DETECTOR = Detector()
KB = 1024
#: Of the hostile texts here, in bytes; a megabyte of each is bench/detection.py's.
LENGTH = 128 * KB
#: How many times longer than prose of the same length a text may take.
MOST = 25
#: Below this, in seconds, a scan of LENGTH is fine whatever prose takes.
FINE_S = 0.05


def seconds(text: str, runs: int) -> float:
    """Return the least time a scan took."""
    least = float("inf")
    for _ in range(runs):
        began = time.thread_time()
        DETECTOR.scan([text])
        least = min(least, time.thread_time() - began)
    return least


@pytest.mark.parametrize("name", ORDINARY)
def test_two_kilobytes_take_less_than_a_millisecond(name: str) -> None:
    """Of prose, JSON, logs full of digits and several scripts. Lines that are all findings may take three."""
    bound = 0.003 if name == "customers" else 0.001
    assert seconds(ORDINARY[name](random.Random(1), 2 * KB), 100) < bound


@pytest.mark.parametrize("name", ORDINARY)
def test_time_grows_with_length_alone(name: str) -> None:
    """Eight times the text takes about eight times as long; sixteen leaves room for caches that no longer hold it."""
    short, long = (ORDINARY[name](random.Random(1), length) for length in (32 * KB, 256 * KB))
    assert seconds(long, 3) < 16 * seconds(short, 7) + 0.005


def test_no_text_is_much_slower_than_prose() -> None:
    """Long runs of what patterns begin with or repeat, findings and near misses among them."""
    bound = max(FINE_S, MOST * seconds(ORDINARY["prose"](random.Random(1), LENGTH), 5))
    slow = {}
    for part in HOSTILE:
        text = hostile(part)[:LENGTH]
        took = seconds(text, 1)
        if took > bound:
            took = seconds(text, 3)  # Somebody else may have had the processor.
        slow[part] = took
    assert {part: took for part, took in slow.items() if took > bound} == {}
