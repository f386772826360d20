"""What a sweep prints: a table for each scenario, by medians over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.schedulinglab.running import Outcome

COLUMNS = ("ttft_p50", "ttft_p90", "ttft_p99", "in_time", "hits", "imbalance", "unfinished")


def medians(outcomes: Sequence[Outcome], rule: str) -> dict[str, float]:
    """Return the median of each of a rule's figures; nothing if it was not run."""
    found = [outcome.figures.as_dict() for outcome in outcomes if outcome.job.rule == rule]
    return {name: statistics.median(each[name] for each in found) for name in found[0]} if found else {}


def best_rival(outcomes: Sequence[Outcome], rules: Sequence[str], figure: str) -> tuple[str, float]:
    """Return which of the rules has the least of a figure, and the figure."""
    return min(((rule, medians(outcomes, rule)[figure]) for rule in rules), key=lambda found: found[1])


def print_scenario(title: str, outcomes: Sequence[Outcome], rules: Sequence[str]) -> None:
    """Print a scenario's table; times are in seconds, after the range of the 90th percentile over the seeds."""
    print(f"\n{title}")
    print(f"  {'':<24}" + "".join(f"{column:>11}" for column in COLUMNS) + "   p90 over seeds")
    for rule in rules:
        figures = medians(outcomes, rule)
        if figures:
            cells = "".join(f"{figures[column]:>11.3f}" for column in COLUMNS)
            p90s = [outcome.figures.ttft_p90 for outcome in outcomes if outcome.job.rule == rule]
            print(f"  {rule:<24}{cells}   {min(p90s):.3f} to {max(p90s):.3f}", flush=True)


def markdown(outcomes: Sequence[Outcome], places: Sequence[tuple[str, float]], rules: Sequence[str]) -> str:
    """Return one table for docs/scheduling.md: times to first token, p50 / p90 / p99 in seconds, and hits over their bound."""
    lines = [f"| scenario (requests/s) | {' | '.join(rules)} |", "|---" * (len(rules) + 1) + "|"]
    for scenario, rate in places:
        of_place = [each for each in outcomes if (each.job.scenario, each.job.rate) == (scenario, rate)]
        cells = [_cell(medians(of_place, rule)) for rule in rules]
        lines.append(f"| `{scenario}` ({rate:g}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(figures: dict[str, float]) -> str:
    if not figures:
        return "not run"
    times = " / ".join(f"{value:.0f}" if (value := figures[name]) >= 9.95 else f"{value:.2g}" for name in COLUMNS[:3])
    return f"{times}; {100 * figures['hits']:.1f} %"
