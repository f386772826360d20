"""This gateway beside the routers of others, over HTTP, in front of the same simulated engines.

    ours                 the whole gateway, a process a worker; workers pull
    sglang-cache-aware   sglang-router with its default policy; sglang-round-robin with the plain one
    vllm-cache-aware     vllm-router with its default policy

All are asked the same at the same moments. Each has eight engines of its own with empty caches; the first requests fill
these, at less than half of the rate, and do not count. Time is dilated: a simulated second takes `--scale` seconds, in every engine and every time
setting of the routers and of ours, until no process is the bottleneck. What a hop costs by itself becomes that much smaller,
on all sides; `bin/bench overhead` measures it. What is left is where requests run, and when. A process that used more than
half a core, or a machine that was three quarters busy, would be a bottleneck: the run is no measurement then, and fails.

    many_profiles   150 profiles of 6,000 tokens, more than one worker's cache holds
    flash_crowd     the same, and for ten seconds half of all requests ask for a new profile

The routers are installed into the user's cache folder at the first run.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bench.enginelab.prompts import one_token_words
from bench.overheadlab.installing import NotInstalled
from bench.overheadlab.ours import make_model
from bench.report import arguments, finish
from bench.schedulinglab import http_figures
from bench.schedulinglab.http_runs import OURS, SYSTEMS, Found, Setup
from bench.schedulinglab.http_work import Texts, gently
from bench.schedulinglab.scenarios import COMPUTE_S, SCENARIOS

#: In requests a simulated second: of the first, 85 % of what ours sustains in virtual time (`bin/bench scheduling goodput`).
RATES = {"many_profiles": 183.0, "flash_crowd": 130.0}
#: The first requests come at this share of the rate.
FILLING_SHARE = 0.4
PART_OF_BEST, HITS, SPREAD_S = 0.3, 0.97, 3 * COMPUTE_S
#: What a process may use of a core, and all processes together of the machine.
BUSIEST, BUSY = 0.5, 0.75
Targets = dict[str, tuple[str, float]]


def add_options(parser: ArgumentParser) -> None:
    """Add the options that `side_by_side` reads, but for the seed."""
    add = parser.add_argument
    add("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="NAME", help=" ".join(SYSTEMS))
    add("--scenarios", nargs="+", choices=RATES, default=tuple(RATES), metavar="NAME", help=" ".join(RATES))
    add("--seeds", type=int, default=3, help="how many, from --seed on; default: %(default)s")
    add("--rate", type=float, help=f"requests in a simulated second; default: {RATES}")
    add("--requests", type=int, default=2000, help="that count; default: %(default)s")
    add("--filling", type=int, default=800, help="requests before them; default: %(default)s")
    add("--scale", type=float, default=15.0, help="seconds that a simulated one takes; default: %(default)s")
    add("--strategy", help="of ours; default: its default")


def side_by_side(options: Namespace) -> tuple[dict[str, float], Targets]:
    """Run it; return all figures, and what is demanded of ours."""
    found = Found()
    with tempfile.TemporaryDirectory() as made:
        model = make_model(Path(made) / "model")
        settings = {"SCHEDULING__STRATEGY": options.strategy} if options.strategy else {}
        texts = Texts(one_token_words(model))
        setup = Setup(Path(made), model, texts, options.systems, options.scale, options.filling, settings)
        for seed in range(options.seed, options.seed + options.seeds):
            for scenario in options.scenarios:
                rate = options.rate or RATES[scenario]
                workload = SCENARIOS[scenario](rate, options.filling + options.requests, seed)
                workload = gently(workload, options.filling, FILLING_SHARE)
                rows = found.run(f"{scenario}-{seed}", scenario, workload, setup)
                print(http_figures.table(scenario, rows), flush=True)
    _tell(found)
    return _judged(found)


def _tell(found: Found) -> None:
    """Print the medians over all seeds, and whether the machine was fast enough."""
    for scenario, systems in found.figures.items():
        print()
        print(http_figures.table(scenario, {name: http_figures.combined(runs) for name, runs in systems.items()}))
    print(f"\n{'busiest process':<32}{'cores':>8}{'most':>8}")
    for part, load in found.loads.items():
        print(f"{part:<32}{load.mean:>8.2f}{load.most:>8.2f}")
    print(
        f"the whole machine was {found.machine:.0%} busy; requests left {found.late_s:.3f} simulated seconds late at worst\n"
    )
    for error in found.errors[:10]:
        print(f"error: {error}")


def _judged(found: Found) -> tuple[dict[str, float], Targets]:
    """Return all figures, and what is demanded: of ours beside the best router, and of the run itself."""
    figures: dict[str, float] = {}
    targets: Targets = {}
    for scenario, systems in found.figures.items():
        for name, runs in systems.items():
            figures |= {f"{scenario} {name} {figure}": value for figure, value in http_figures.combined(runs).items()}
            if name != OURS and OURS in systems:
                parts = http_figures.ratios(systems[OURS], runs)
                figures |= {f"{scenario} ours/{name} {figure}": value for figure, value in parts.items()}
        others = [runs for name, runs in systems.items() if name != OURS]
        if OURS in systems:
            targets |= {f"{scenario} {OURS} hits": (">=", HITS), f"{scenario} {OURS} errors": ("<=", 0.0)}
            if scenario == "flash_crowd":
                targets[f"{scenario} {OURS} spread_s"] = ("<=", SPREAD_S)
        if OURS in systems and others:
            best = http_figures.best(others)
            parts = http_figures.ratios(systems[OURS], best)
            figures |= {f"{scenario} ours/best {figure}": value for figure, value in parts.items()}
            targets[f"{scenario} ours/best ttft_p90"] = ("<=", PART_OF_BEST if scenario == "many_profiles" else 1.0)
    figures |= {f"cores {part}": load.mean for part, load in found.loads.items()}
    figures["cores busiest"] = max(load.mean for load in found.loads.values())
    figures |= {"machine busy": found.machine, "late_s": found.late_s}
    return figures, {**targets, "cores busiest": ("<=", BUSIEST), "machine busy": ("<=", BUSY)}


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    add_options(parser)
    options = parser.parse_args()
    # So that everything is stopped, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        judged = side_by_side(options)
    except NotInstalled as error:
        sys.exit(f"a router cannot be installed: {error}")
    finish("scheduling-side", options, *judged)


if __name__ == "__main__":
    main()
