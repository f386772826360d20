"""Harm done on purpose: a whole gateway of real processes that are killed, cut off and overloaded, and judged.

A scenario is one module. It stands a `site` up (Redis, a database, gateways, workers, a housekeeper), has a crowd of
`clients` ask their questions over HTTP, does its harm meanwhile, and then two judges look: `judge`, who reads SQL by
himself, and the clients' own record of what they were told. `stock` does the same kills to Celery as it comes.

The engine is simulated (docs/simulation.md): what is shown here says nothing about the speed of a model.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.chaoslab import database, gateways, long, overload, poison, redis_away, stalled, stock, workers
from bench.chaoslab.lab import Lab, Outcome

#: Each scenario by its name, in the order in which they are run.
SCENARIOS: dict[str, Callable[[Lab], Outcome]] = {
    "workers": workers.run,
    "gateways": gateways.run,
    "redis": redis_away.run,
    "database": database.run,
    "poison": poison.run,
    "overload": overload.run,
    "stalled": stalled.run,
    "long": long.run,
    "stock": stock.run,
}
