"""Taking one message of the queue, as a worker with room for one and nothing in hand does."""

from __future__ import annotations

from typing import Any

from tasks.queueing.pull import Wish
from tasks.queueing.scripts import Scripts

ANY_TOKENS = 10**12


def reserve_one(scripts: Scripts, holder: str, **wishes: Any) -> list[Any] | None:
    """Return tag, record and how often the message came back before, or None if there is none for this worker."""
    wish = Wish(**{"worker": holder, "room": 1, "budget": ANY_TOKENS, **wishes})
    taken: list[list[Any]] = scripts.run("reserve", holder, wish.to_json())[0]
    return taken[0] if taken else None
