"""Where coverage does not measure: it takes as long as what it measures, or twice as long, and need not find anything.

Python runs everything more slowly while coverage traces it, the code of libraries included. A process whose environment
has a variable of coverage's measures itself; if it is killed in the end, what it measured is lost.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

#: Where a process is given one of these, coverage measures it.
COVERAGE_VARIABLES = ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")


@contextmanager
def unmeasured() -> Iterator[None]:
    """Trace nothing here, nor in threads and processes that are started meanwhile, however long these live."""
    here, in_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        with unmeasured_children():
            yield
    finally:
        threading.settrace(in_threads)
        sys.settrace(here)


@contextmanager
def unmeasured_children() -> Iterator[None]:
    """Measure nothing in processes that are started meanwhile."""
    with pytest.MonkeyPatch.context() as environment:
        for name in COVERAGE_VARIABLES:
            environment.delenv(name, raising=False)
        yield
