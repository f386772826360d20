"""Which worker runs what: the queue's strategies and models of other gateways' rules, in virtual time.

Simulated workers (docs/simulation.md) are fed by the queue's own scripts, in a real Redis whose clock the bench sets, and by
the workers' own admission rule. Rivals are models of published rules. docs/scheduling.md explains the rule, the scenarios and
the figures.

    sweep      every rule in every scenario: time to first token, requests in time, cache hits, balance
    goodput    the highest rate with nine requests in ten within the SLO
    fairness   what a flood by one organization does to the others
    cost       Redis's time for a reservation with 10,000 lists and 64 workers; its memory for 100,000 profiles

What is asked for by name is done; by default all of it. With one process a core, all takes half an hour. `--side` does none of
that: it sets the whole gateway beside the routers of others, over HTTP (`--side --help`).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from bench.report import arguments, finish
from bench.schedulinglab.running import OURS, RULES, Job, Outcome, in_processes, run
from bench.schedulinglab.scenarios import COMPUTE_S, SCENARIOS
from bench.schedulinglab.tables import best_rival, markdown, medians, print_scenario

#: The scenarios, each with its rate in requests a second.
PLACES: tuple[tuple[str, float], ...] = (
    # 60, 85 and 95 % of what OURS sustains there, which is about 225; see `goodput`.
    *(("many_profiles", rate) for rate in (135, 190, 215)),
    ("few_profiles", 200),
    ("one_profile", 200),
    ("flash_crowd", 130),
    ("shared_bases", 160),
    ("worker_lost", 140),
    ("new_version", 140),
)
PARTS = ("sweep", "goodput", "fairness", "cost")


def main() -> None:
    """Run the benchmark."""
    if "--side" in sys.argv:
        from bench.schedulinglab import http_main

        # It has options of its own.
        sys.argv.remove("--side")
        http_main.main()
        return
    options = _options()
    figures: dict[str, float] = {}
    targets: dict[str, tuple[str, float]] = {}
    if "sweep" in options.parts:
        _sweep(options, figures, targets)
    if "goodput" in options.parts:
        _goodput(options, figures, targets)
    if "fairness" in options.parts:
        _fairness(options, figures, targets)
    if "cost" in options.parts:
        from bench.schedulinglab.reserve_cost import reserve_cost

        figures |= reserve_cost(options.seed)
        targets["reserve_p99_us"] = ("<=", 1_000)
    finish("scheduling", options, figures, targets)


def _options() -> Namespace:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each, with seeds from --seed on; default: %(default)s"
    )
    parser.add_argument("--requests", type=int, default=9_000, help="of each run; default: %(default)s")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, metavar="RULE", help=", ".join(RULES))
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at once; default: %(default)s")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="draw the sweep into FOLDER")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the sweep's table to FILE, for docs/scheduling.md"
    )
    options = parser.parse_args()
    options.parts = options.parts or list(PARTS)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


def _seeds(options: Namespace) -> range:
    return range(options.seed, options.seed + options.seeds)


def _sweep(options: Namespace, figures: dict[str, float], targets: dict[str, tuple[str, float]]) -> None:
    places = [place for place in PLACES if place[0] in options.scenarios]
    jobs = [
        Job(rule, scenario, rate, options.requests, seed)
        for scenario, rate in places
        for rule in options.rules
        for seed in _seeds(options)
    ]
    outcomes = in_processes(run, jobs, options.processes)
    for scenario, rate in places:
        of_place = [each for each in outcomes if (each.job.scenario, each.job.rate) == (scenario, rate)]
        print_scenario(f"{scenario}, {rate:g} requests/s", of_place, options.rules)
        _compare(f"{scenario}_{rate:g}", of_place, options.rules, figures, targets)
    if options.markdown:
        options.markdown.write_text(markdown(outcomes, places, options.rules), "utf-8")
    if options.images:
        from bench.schedulinglab.plots import first_tokens

        first_tokens(outcomes, options.rules, options.images)
    if options.json:
        kept = [{"job": _plain(each.job), "figures": each.figures.as_dict()} for each in outcomes]
        options.json.with_suffix(".runs.json").write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


def _compare(
    name: str,
    outcomes: Sequence[Outcome],
    rules: Sequence[str],
    figures: dict[str, float],
    targets: dict[str, tuple[str, float]],
) -> None:
    """Set OURS beside the best of the others, each by the median over the seeds."""
    ours = medians(outcomes, OURS)
    if not ours:
        return
    figures[f"{name}_hits"] = ours["hits"]
    targets[f"{name}_hits"] = (">=", 0.97)
    if "spread_s" in ours:
        figures[f"{name}_spread_computes"] = ours["spread_s"] / COMPUTE_S
        targets[f"{name}_spread_computes"] = ("<=", 3.0)
    for figure in ("ttft_p90", "ttft_p99"):
        figures[f"{name}_{figure}_s"] = ours[figure]
        others = [rule for rule in rules if rule != OURS]
        if others:
            figures[f"{name}_{figure}_of_best_other"] = ours[figure] / best_rival(outcomes, others, figure)[1]
            targets[f"{name}_{figure}_of_best_other"] = ("<=", 1.1)


def _goodput(options: Namespace, figures: dict[str, float], targets: dict[str, tuple[str, float]]) -> None:
    from bench.schedulinglab.goodput import curves

    found, points = curves(options.rules, "many_profiles", options.requests // 2, options.seed, options.processes)
    print(f"\nhighest rate with 90 % of requests within the SLO, many_profiles, seed {options.seed}")
    for rule, rate in found.items():
        print(f"  {rule:<24}{rate:>8.0f} requests/s")
        figures[f"goodput_{rule}"] = rate
    others = [rate for rule, rate in found.items() if rule != OURS]
    if OURS in found and others:
        figures["goodput_of_best_other"] = found[OURS] / max(others)
        targets["goodput_of_best_other"] = (">=", 1.2)
    if options.images:
        from bench.schedulinglab.plots import in_time

        in_time(points, options.images)


def _fairness(options: Namespace, figures: dict[str, float], targets: dict[str, tuple[str, float]]) -> None:
    from bench.schedulinglab.fairness import CASES, Case, Fairness, fairness

    cases = [Case(*of, seed) for of in CASES for seed in _seeds(options)]
    found = dict(zip(cases, in_processes(fairness, cases, options.processes), strict=True))
    print("\nthe others' time to first token, calm and in a flood, medians over the seeds")
    columns = ("calm p90", "p99", "flood p90", "p99", "flooder p50", "busy")
    print(f"  {'profiles each':>13}{'threshold':>11}{'calm/s':>8}" + "".join(f"{column:>13}" for column in columns))
    for each, threshold, rate in CASES:
        runs = [found[Case(each, threshold, rate, seed)] for seed in _seeds(options)]
        median = {name: statistics.median(getattr(run, name) for run in runs) for name in Fairness.__slots__}
        name = f"fairness_{each}_profiles_{threshold or 'no'}_threshold_{rate}"
        print(f"  {each:>13}{threshold:>11}{rate:>8}" + "".join(f"{value:>13.3f}" for value in median.values()))
        figures |= {f"{name}_{figure}": value for figure, value in median.items()}
        figures[f"{name}_p99_ratio"] = statistics.median(run.flood_p99 / run.calm_p99 for run in runs)
        targets |= {f"{name}_p99_ratio": ("<=", 1.5), f"{name}_busy": (">=", 0.95)}


def _plain(job: Job) -> dict[str, object]:
    return {name: getattr(job, name) for name in job.__slots__}


if __name__ == "__main__":
    main()
