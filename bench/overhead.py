"""What a request costs in this gateway, beside LiteLLM's proxy, Portkey's gateway and SGLang's router, in one run.

Behind each answers a model that takes no time: behind ours the simulated engine in the worker, behind the others one process
that knows its answer. So what is measured is all that a gateway adds. The same client asks all of them the same: a system
prompt of 4 KB, a question, 20 tokens.

    plain C, stream C    C clients ask again as soon as they are answered; the model says all at once
    plain half, ...      requests come at random moments, at half the rate that the system was capable of
    paced C              streams whose words come one by one, as from a real engine

Processor time is summed over all processes: with ours gateway, Redis, worker (the simulated engine in it), housekeeper and
PostgreSQL; SQLite is part of the others. The client's and the model's do not count. `direct` is the model without a gateway,
what is added to its latency is the gateway's. ours-inline has the prompt in each request, as the others must have it; ours has it in
the agent's profile.

Ours need no network: `--systems ours`. The others are installed into the user's cache folder at the first run.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from bench.overheadlab import figures, growth, ours, peers, profiling
from bench.overheadlab.client import Client
from bench.overheadlab.comparing import (
    COMPARED,
    GAP_S,
    KINDS,
    OURS,
    compare,
    our_systems,
    paced,
    say,
    system_prompt,
    warm_up,
)
from bench.overheadlab.engine_cost import engine_ms
from bench.overheadlab.rounds import Load, Rounds
from bench.report import arguments, finish

SYSTEMS = (*OURS, *peers.PEERS)
EIGHTH, ADDED_P50_MS = 0.125, 10.0
#: The latter over all requests of --memory, without the first fifth.
GATEWAY_MB, GROWTH_MB = 150.0, 5.0
Judged = tuple[dict[str, float], dict[str, tuple[str, float]]]


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="NAME", help=" ".join(SYSTEMS)
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=" ".join(KINDS))
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=400, help="in each cell; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell, at most; default: %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, COMPARED, 64], help="default: %(default)s")
    parser.add_argument(
        "--memory",
        nargs="?",
        type=int,
        const=100_000,
        metavar="REQUESTS",
        help="only the gateway's memory over so many",
    )
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="only write flame graphs of ours there")
    options = parser.parse_args()
    # So that everything is stopped, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # It makes Python start slowly, and costs whoever imports late at each request.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if options.profile:
            profile(options, folder)
        elif options.memory:
            finish("overhead-memory", options, *memory(options, folder))
        else:
            finish("overhead", options, *overhead(options, folder))


def overhead(options: Namespace, folder: Path) -> Judged:
    """Compare; return all figures, and what is demanded of ours. What a missing peer was to show is missed."""
    rounds, missing = compare(options, folder)
    print(figures.table(rounds), figures.by_part(rounds, COMPARED), sep="\n")
    for peer, reason in missing.items():
        print(f"{peer} is not measured, it cannot be installed: {reason}")
    for error in rounds.errors[:10]:
        print(f"error: {error}")
    found = {**figures.tell(rounds), **rounds.idle, "engine cpu_ms": engine_ms(options.seed)}
    found["errors"] = float(len(rounds.errors))
    targets = {"errors": ("<=", 0.0)}
    for kind in KINDS:
        load = f"{kind} {COMPARED}"
        if {"ours", "litellm"} <= set(options.systems) and ("ours", load) in rounds.samples:
            measured = ("litellm", load) in rounds.samples
            found[f"{kind} part_of_litellm"] = figures.ratio(rounds, "ours", "litellm", load) if measured else math.inf
            targets[f"{kind} part_of_litellm"] = ("<=", EIGHTH)
    if ("ours", "plain half") in rounds.samples:
        targets["ours plain half added_p50_ms"] = ("<=", ADDED_P50_MS)
    return found, targets


def memory(options: Namespace, folder: Path) -> Judged:
    """Ask very many requests; return what became of memory, and what is demanded of the gateway's."""
    prompt, model = system_prompt(), ours.make_model(folder / "model")
    with Client() as client, ours.our_site(folder / "site", model, prompt) as site:
        rounds = Rounds(client, options.requests, math.inf, options.seed)
        found = growth.grow(rounds, site, site.system("ours"), options.memory, say)
        if not rounds.errors:
            site.check(rounds.answered["ours"])
    targets = {"memory gateway_mb": ("<=", GATEWAY_MB), "memory gateway_growth_mb": ("<=", GROWTH_MB)}
    return {**found, "errors": float(len(rounds.errors))}, {**targets, "errors": ("<=", 0.0)}


def profile(options: Namespace, folder: Path) -> None:
    """Record where the processor time of ours goes, plain, as streams, and as streams of a word at a time."""
    prompt, model = system_prompt(), ours.make_model(folder / "model")
    at_once = [Load(f"{kind} {COMPARED}", kind == "stream", COMPARED) for kind in ("plain", "stream")]
    with Client() as client:
        rounds = Rounds(client, options.requests, options.seconds, options.seed)
        for name, loads, gap_s in (("sites", at_once, 0.0), ("paced", [paced()], GAP_S)):
            with our_systems(["ours"], folder / name, model, prompt, rounds, gap_s) as [system]:
                warm_up(rounds, [system], loads)
                profiling.record(rounds, system, loads, options.profile)
    print(f"flame graphs are in {options.profile}")


if __name__ == "__main__":
    main()
