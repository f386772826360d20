"""What every benchmark ends with: a short table, and the same as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    return parser


def finish(
    name: str, options: argparse.Namespace, figures: Mapping[str, float], targets: Mapping[str, tuple[str, float]]
) -> None:
    """Print the figures, each beside its target if it has one, and exit with 1 if one is missed.

    A target is a comparison, `<=` or `>=`, and a number.
    """
    held = True
    for figure, value in figures.items():
        line = f"{figure:<44}{value:>14,.3f}"
        if figure in targets:
            comparison, bound = targets[figure]
            met = value <= bound if comparison == "<=" else value >= bound
            held = held and met
            line += f"   {comparison} {bound:,.3f}  {'held' if met else 'MISSED'}"
        print(line)
    if options.json:
        told = {figure: f"{comparison} {bound}" for figure, (comparison, bound) in targets.items()}
        content = {"name": name, "seed": options.seed, "figures": dict(figures), "targets": told, "held": held}
        options.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    sys.exit(0 if held else 1)
