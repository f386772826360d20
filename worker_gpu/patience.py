"""Waiting for MetaQore to answer, so that a short outage does not end what is queued.

Where governance cannot learn how a request's project stands, it refuses the request, and says that asking later may
help. The client of a request that is admitted cannot be told to send it again, so the worker asks again in its place: soon
at first, then less often, and never in step with others. This is only a coroutine that sleeps. No thread, no
transaction and no engine slot is held meanwhile; the request stays leased as one that runs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from tasks.errors import ProjectUnverified
from tasks.lifecycle import Refusal

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0


def is_unanswered(refusal: Refusal | None) -> bool:
    """Tell whether the refusal is for want of an answer, so that asking later may help."""
    return refusal is not None and refusal.code == ProjectUnverified.code


async def look_again(
    look: Callable[[], Awaitable[Refusal | None]], refusal: Refusal | None, patience_s: float
) -> Refusal | None:
    """Return what `look` gives once it is an answer, or its last word when patience is over.

    `refusal` is what it gave just now. Each pause is drawn between half and all of its length, which doubles.
    """
    loop = asyncio.get_running_loop()
    until, pause_s = loop.time() + patience_s, FIRST_PAUSE_S
    while is_unanswered(refusal) and (left_s := until - loop.time()) > 0:
        await asyncio.sleep(min(left_s, pause_s * random.uniform(0.5, 1)))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        refusal = await look()
    return refusal
