"""Runs one scenario on several systems at once, each new and with empty caches, and keeps what they showed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.overheadlab.comparing import say
from bench.schedulinglab import http_figures, http_peers
from bench.schedulinglab.http_client import Served, Target, play
from bench.schedulinglab.http_engine import engine_of
from bench.schedulinglab.http_load import Load, Watch
from bench.schedulinglab.http_ours import OurFleet, our_fleet
from bench.schedulinglab.http_work import Texts
from bench.schedulinglab.scenarios import OPTIONS, WORKERS, Workload

OURS = "ours"
SYSTEMS = (OURS, *http_peers.PEERS)
#: Longer than any answer here; a request says how long its own is.
ENDLESS_TOKENS = 100_000
Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same in all runs. `scale` is how many seconds a simulated one takes; `settings` are ours.

    The first `filling` requests of a run do not count.
    """

    folder: Path
    model: Path
    texts: Texts
    systems: Sequence[str]
    scale: float
    filling: int
    settings: Mapping[str, str]


@dataclass(slots=True)
class Found:
    """What the runs showed: figures by scenario and system, one a seed; of each part the highest load of a process."""

    figures: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    loads: dict[str, Load] = field(default_factory=dict)
    late_s: float = 0.0
    machine: float = 0.0
    errors: list[str] = field(default_factory=list)

    def run(self, name: str, scenario: str, workload: Workload, setup: Setup) -> dict[str, Figures]:
        """Put a scenario's requests on all systems; return this run's figures by system."""
        folder = setup.folder / name
        folder.mkdir()
        say(f"{name}: starting {', '.join(setup.systems)}")
        with ExitStack() as stack:
            targets, fleet = _start(stack, folder, workload, setup)
            parts = {
                f"{target.system.name} {part}": roots
                for target in targets
                for part, roots in target.system.parts.items()
            }
            minutes = workload.asks[-1].at * setup.scale / 60
            say(
                f"{name}: {len(workload.asks):,} requests in {minutes:.0f} minutes, and what is still to be answered then"
            )
            with Watch({**parts, "client": [psutil.Process()]}) as watch:
                served = asyncio.run(play(workload.asks, targets, setup.texts, setup.scale))
            workers = {} if fleet is None else fleet.workers()
        self._note(watch)
        told = {}
        for target in targets:
            system = target.system.name
            told[system] = self._figures(workload, served[system], target, workers, setup.filling)
            self.figures.setdefault(scenario, {}).setdefault(system, []).append(told[system])
        return told

    def _figures(
        self, workload: Workload, served: Sequence[Served], target: Target, workers: Mapping[str, str], filling: int
    ) -> Figures:
        self.late_s = max(self.late_s, *(one.late_s for one in served))
        self.errors += [f"{target.system.name}: {one.error}" for one in served if one.error]
        numbers = {name: number for number, name in enumerate(sorted(set(workers.values())))}
        answers = [one.said.id for one in served if one.said]
        of = {each: numbers[workers[each]] if target.by_agent else engine_of(each) for each in answers}
        runs = [http_figures.run_of(one, of) for one in served]
        return http_figures.figures(workload, runs, filling, target.static_tokens, WORKERS)

    def _note(self, watch: Watch) -> None:
        for part, load in watch.loads.items():
            before = self.loads.get(part, Load(0.0, 0.0))
            self.loads[part] = Load(max(load.mean, before.mean), max(load.most, before.most))
        self.machine = max(self.machine, watch.machine)


def _start(stack: ExitStack, folder: Path, workload: Workload, setup: Setup) -> tuple[list[Target], OurFleet | None]:
    """Start all systems; return how they are asked, and ours if it is among them."""
    engine = OPTIONS.model_copy(update={"time_scale": setup.scale, "answer_tokens": ENDLESS_TOKENS})
    targets = []
    fleet = None
    for name in setup.systems:
        if name == OURS:
            profiles = list(dict.fromkeys(ask.profile for ask in workload.asks))
            ours = our_fleet(folder / name, setup.model, profiles, setup.texts, WORKERS, engine, setup.settings)
            fleet = stack.enter_context(ours)
            targets.append(fleet.target)
        else:
            targets.append(stack.enter_context(http_peers.running(name, folder / name, WORKERS, engine)))
    return targets, fleet
