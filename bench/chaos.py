"""Harm done on purpose, and what comes of it: every scenario of bench/chaoslab, or those that are named.

Real processes are killed, cut off and overloaded: gateways, workers, Redis, the database, around the simulated engine.
Each scenario's module says what it does and what it demands. `stock` does the workers' kills to Celery's own Redis
transport, as a control: it must lose.

--scale 0.05 takes a twentieth of all counts and durations. The seed decides where and when harm falls; what the machine
makes of it is never twice the same.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.chaoslab import SCENARIOS
from bench.chaoslab.lab import Lab, Outcome
from bench.report import arguments, finish
from tests.tiny_model import make_tiny_model


def main() -> None:
    """Run them."""
    parser = arguments(__doc__)
    names = list(SCENARIOS)
    parser.add_argument("--scenario", action="append", choices=names, help="may be given again; default: all of them")
    parser.add_argument("--scale", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--control", action="store_true", help="and the stock transport, whatever is named")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave logs and databases behind")
    options = parser.parse_args()
    chosen = options.scenario or names
    if options.control and "stock" not in chosen:
        chosen = [*chosen, "stock"]
    # So that everything is stopped, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made)
        figures: dict[str, float] = {}
        targets: dict[str, tuple[str, float]] = {}
        model = make_tiny_model(folder / "model")
        for name in chosen:
            outcome = run(name, folder / name, model, options)
            figures |= {f"{name}.{figure}": value for figure, value in outcome.figures.items()}
            targets |= {f"{name}.{figure}": target for figure, target in outcome.targets.items()}
        finish("chaos", options, figures, targets)


def run(name: str, folder: Path, model: Path, options: Any) -> Outcome:
    """Run one scenario in a folder of its own, and say what went wrong in it."""
    folder.mkdir()
    print(f"{name}: seed {options.seed}, scale {options.scale:g}", flush=True)
    began = time.monotonic()
    lab = Lab(folder, model, options.seed, options.scale, say=lambda text: print(text, flush=True))
    outcome = SCENARIOS[name](lab)
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    for example in outcome.examples:
        print(f"  {example}", flush=True)
    return outcome


if __name__ == "__main__":
    main()
