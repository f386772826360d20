"""What a check gives: one fact, whether it is good, and what to do if it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tasks.settings import Settings

#: `unknown`: it could not be looked at, which is no fault of the installation's by itself.
Status = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about the installation. `says` is one sentence, `remedy` one command or setting, or empty."""

    name: str
    status: Status
    says: str
    remedy: str = ""


#: Looks at one thing, and gives what it finds as it finds it. What it raises is told as unknown.
Examine = Callable[[Settings], Iterator[Finding]]


def ok(name: str, says: str) -> Finding:
    """Return that all is well."""
    return Finding(name, "ok", says)


def warn(name: str, says: str, remedy: str) -> Finding:
    """Return what works, and should not stay so."""
    return Finding(name, "warn", says, remedy)


def fail(name: str, says: str, remedy: str) -> Finding:
    """Return what does not work, or puts requests or data at risk."""
    return Finding(name, "fail", says, remedy)


def unknown(name: str, says: str, remedy: str = "") -> Finding:
    """Return what could not be looked at."""
    return Finding(name, "unknown", says, remedy)
