"""Kills that fall at random points of a crowd's progress."""

from __future__ import annotations

import random
from collections import defaultdict

from bench.chaoslab.clients import Crowd
from bench.chaoslab.process import Process
from bench.chaoslab.site import Site

BETWEEN_S = 300.0
#: A kill falls so long after its point of progress at most, so that it does not always follow an answer's end.
LATER_S = 0.3


def kill_along(
    site: Site, crowd: Crowd, of: list[Process], *, total: int, kills: int, rng: random.Random
) -> dict[str, list[float]]:
    """Kill `of` these processes while `total` questions are answered, then wait for the crowd's end.

    Returns when each was killed, by its name.
    """
    killed: dict[str, list[float]] = defaultdict(list)
    site.progress = lambda: f"{sum(map(len, killed.values()))} of {kills} kills, {crowd.progress()}"
    # The last answers are left in peace: a kill when all is answered would show nothing.
    for moment in sorted(rng.sample(range(total * 19 // 20), kills)):
        site.until(lambda moment=moment: crowd.finished >= moment, BETWEEN_S, "answers before a kill")  # type: ignore[misc]
        site.wait(rng.uniform(0.0, LATER_S))
        victim = site.kill_one(of, rng)
        killed[victim.name].append(victim.killed_at)
    site.see_out(crowd)
    return killed
