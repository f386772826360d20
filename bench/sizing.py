"""What docs/sizing.md multiplies: what a request and a token cost each process, Redis and the database.

A whole installation each on SQLite and on PostgreSQL, around the simulated engine, is asked: plain requests with a short
answer by 16 clients, then streams of 41 tokens that come one by one by 96. What these cost more is the price of tokens; `long` names them.
The last of the figures need no clients: the worker is killed, and tasks with a context of 4 KB wait.

Processor times are of one core of the machine; a gateway and a worker compute on one core each, as Python does. The
simulated engine is part of the worker's.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import requests

from bench.overheadlab import ours, planning
from bench.overheadlab.client import Client
from bench.overheadlab.comparing import GAP_S, say, system_prompt, warm_up
from bench.overheadlab.ours import AGENT, OurSite
from bench.overheadlab.rounds import Load, Rounds, Sample
from bench.overheadlab.stores import Stores
from bench.overheadlab.system import System
from bench.overheadlab.usage import idle_cores, largest_rss_mb
from bench.report import arguments, finish

#: Plain requests at once, and streams: so many that what streams share, they share as in a busy gateway.
CLIENTS, STREAMS = 16, 96
SHORT_TOKENS, LONG_TOKENS = 1, 41
IDLE_S = 2.0
CONTEXT_BYTES = 4096
#: Of the examples, in requests a second.
RATES = (10.0, 100.0, 1000.0)
DATABASES: tuple[ours.Database, ...] = ("sqlite", "postgresql")


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=1_000, help="plain ones; default: %(default)s")
    parser.add_argument("--streams", type=int, default=480, help="default: %(default)s")
    parser.add_argument("--waiting", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES, help="default: both")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measured: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, Client() as client:
        prompt, model = system_prompt(), ours.make_model(Path(folder) / "model")
        for database in options.databases:
            say(database)
            rounds = Rounds(client, options.requests, 60.0, options.seed)
            with ours.our_site(Path(folder) / database, model, prompt, database, GAP_S) as site, Stores(site) as stores:
                measured[database] = measure(rounds, site, stores, options)
            if rounds.errors:
                raise SystemExit(f"error: {rounds.errors[0]}")
    print("", planning.costs(measured), sep="\n")
    for database, found in measured.items():
        plans = planning.table(found, RATES, LONG_TOKENS)
        print(f"\n{database}, {planning.ANSWER_TOKENS} tokens an answer", plans, sep="\n")
    print()
    flat = {f"{database} {name}": value for database, found in measured.items() for name, value in found.items()}
    finish("sizing", options, flat, {})


def measure(rounds: Rounds, site: OurSite, stores: Stores, options: Namespace) -> dict[str, float]:
    """Measure one installation."""
    system = site.system("ours")
    plain = Load("plain", stream=False, clients=CLIENTS, tokens=SHORT_TOKENS)
    streams = Load("streams", stream=True, clients=STREAMS, tokens=LONG_TOKENS)
    warm_up(rounds, [system], [plain, streams])
    figures = {f"idle_cores {part}": idle_cores({part: roots}, IDLE_S) for part, roots in site.parts.items()}
    short, short_bytes = counted(rounds, stores, system, plain, options.requests)
    long, long_bytes = counted(rounds, stores, system, streams, options.streams)
    site.check(rounds.answered[system.name])
    tokens = LONG_TOKENS - SHORT_TOKENS
    for part, cost_ms in short.cpu_ms.items():
        token_ms = max(0.0, long.cpu_ms[part] - cost_ms) / tokens
        figures |= {f"cpu_ms_request {part}": cost_ms, f"cpu_ms_token {part}": token_ms}
        if part in ("gateway", "worker"):  # Each computes on one core, so this is what one process can do at most.
            figures[f"requests_per_s {part}"] = 1000 / cost_ms
            figures[f"tokens_per_s {part}"] = 1000 / token_ms if token_ms else float("inf")
    figures |= {f"bytes_request {store}": size for store, size in short_bytes.items()}
    figures |= {f"bytes_long_request {store}": size for store, size in long_bytes.items()}
    figures |= {f"memory_mb {part}": largest_rss_mb(roots) for part, roots in site.parts.items()}
    figures |= {f"connections {store}": number for store, number in stores.connections().items()}
    return figures | waiting(site, stores, options.waiting)


def counted(
    rounds: Rounds, stores: Stores, system: System, load: Load, requests: int
) -> tuple[Sample, dict[str, float]]:
    """Put a load on the system; return what it cost, and the bytes of each store a request."""
    before = stores.counters()
    sample = rounds.cell(system, load, requests)
    if sample is None:
        raise SystemExit(f"error: nothing was answered: {rounds.errors[:1]}")
    return sample, {store: (size - before[store]) / sample.requests for store, size in stores.counters().items()}


def waiting(site: OurSite, stores: Stores, number: int) -> dict[str, float]:
    """Return what requests that wait in the queue take of Redis's memory, each."""
    [worker] = site.site.workers
    worker.kill()
    before = stores.queue_bytes()
    text = (system_prompt() * 2)[:CONTEXT_BYTES]
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {site.site.key}"
        for index in range(number):
            body = {"agent": AGENT, "directive": f"Task {index}: sum this up.", "context": {"log": text}}
            session.post(f"{site.site.urls[0]}/v1/tasks", json=body, timeout=30).raise_for_status()
    return {"bytes_waiting redis_memory": (stores.queue_bytes() - before) / number}


if __name__ == "__main__":
    main()
