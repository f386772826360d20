"""Pictures of a sweep, as PNG for whoever reads and SVG for whoever prints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.schedulinglab.running import OURS, Outcome

mpl.use("Agg")
# An SVG of the same figures is the same file.
mpl.rcParams["svg.hashsalt"] = "scheduling"

from matplotlib import pyplot as plt  # noqa: E402  a display must not be looked for

LEAST_S = 0.01
OURS_COLOUR = "#c2410c"
OTHER_COLOURS = ("#1d4ed8", "#0e7490", "#4d7c0f", "#7c3aed", "#64748b", "#a16207", "#be185d", "#334155", "#000000")


def first_tokens(outcomes: Sequence[Outcome], rules: Sequence[str], folder: Path) -> None:
    """Draw the times to first token by scenario and rule: a bar to the 90th percentile, a line on to the 99th."""
    scenarios = list(dict.fromkeys((outcome.job.scenario, outcome.job.rate) for outcome in outcomes))
    most = 1.3 * max(outcome.figures.ttft_p99 for outcome in outcomes)
    columns = min(3, len(scenarios))
    rows = math.ceil(len(scenarios) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, sharex=True)
    for axis, place in zip(axes.flat, scenarios, strict=False):
        for position, rule in enumerate(reversed(rules)):
            of_rule = [o.figures for o in outcomes if (o.job.scenario, o.job.rate) == place and o.job.rule == rule]
            if of_rule:
                p90 = statistics.median(each.ttft_p90 for each in of_rule)
                p99 = statistics.median(each.ttft_p99 for each in of_rule)
                colour = _colour(rule, rules)
                axis.barh(position, p90 - LEAST_S, left=LEAST_S, color=colour)
                axis.plot([p90, p99], [position, position], color=colour, linewidth=1.5)
        axis.set_yticks(range(len(rules)), list(reversed(rules)), fontsize=7)
        axis.set_xscale("log")
        axis.set_xlim(LEAST_S, most)
        axis.set_title(f"{place[0].replace('_', ' ')}, {place[1]:g} requests/s", fontsize=9)
    for axis in axes.flat[len(scenarios) :]:
        axis.set_visible(False)
    figure.supxlabel("time to first token in s: bar to the 90th percentile, line to the 99th", fontsize=9)
    _save(figure, folder, "scheduling-first-tokens")


def in_time(curves: Mapping[str, Sequence[tuple[float, float]]], folder: Path) -> None:
    """Draw the share of requests within the SLO over the rate, a line for each rule."""
    figure, axis = plt.subplots(figsize=(8.5, 4))
    for rule, points in curves.items():
        style: dict[str, Any] = {"linewidth": 2.5} if rule == OURS else {"linewidth": 1.2}
        axis.plot(
            *zip(*points, strict=True), marker="o", markersize=3, label=rule, color=_colour(rule, list(curves)), **style
        )
    axis.axhline(0.9, color="black", linewidth=0.6, linestyle=":")
    axis.set_xlabel("requests/s")
    axis.set_ylabel("share of requests within the SLO")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    _save(figure, folder, "scheduling-in-time")


def _colour(rule: str, rules: Sequence[str]) -> str:
    others = [other for other in rules if other != OURS]
    return OURS_COLOUR if rule == OURS else OTHER_COLOURS[others.index(rule) % len(OTHER_COLOURS)]


def _save(figure: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=110)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
