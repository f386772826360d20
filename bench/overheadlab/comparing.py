"""Starts what is compared and runs the rounds of it: first without any times, then with words that come one by one."""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from bench.overheadlab import figures, ours, peers
from bench.overheadlab.client import Client
from bench.overheadlab.installing import NotInstalled
from bench.overheadlab.rounds import Load, Rounds
from bench.overheadlab.system import System
from bench.overheadlab.upstream import MODEL, PACED_MODEL, TEXT, Upstream
from bench.overheadlab.usage import idle_cores
from tests.workers import ROOT

OURS = ("ours", "ours-inline", "ours-postgresql")
KINDS = ("plain", "stream", "paced")
PROMPT_BYTES = 4096
#: At which number of clients systems are compared.
COMPARED = 16
WARM_UP = 60
IDLE_S = 3.0
#: Wide enough that hardly any frame of ours carries two words.
GAP_S = 0.025


def compare(options: Namespace, folder: Path) -> tuple[Rounds, dict[str, str]]:
    """Measure all systems; return what was measured, and which peers are missing, and why."""
    prompt, model = system_prompt(), ours.make_model(folder / "model")
    missing: dict[str, str] = {}
    with Client() as client, Upstream(GAP_S) as upstream, ExitStack() as stack:
        rounds = Rounds(client, options.requests, options.seconds, options.seed)
        direct = System(figures.DIRECT, upstream.port, MODEL, {"model": [upstream.process]}, {}, prompt, TEXT)
        others = []
        for name in (name for name in options.systems if name in peers.PEERS):
            try:
                others.append(stack.enter_context(peers.running(name, folder / name, upstream.port, prompt)))
            except NotInstalled as error:
                missing[name] = str(error)
        if kinds := [kind for kind in options.kinds if kind != "paced"]:
            loads = [Load(f"{kind} {number}", kind == "stream", number) for kind in kinds for number in options.clients]
            with our_systems(options.systems, folder / "sites", model, prompt, rounds) as own:
                systems = [*own, *others]
                for system in systems:
                    rounds.idle[f"{system.name} idle_cores"] = idle_cores(system.parts, min(IDLE_S, options.seconds))
                measure(rounds, direct, systems, loads, options.rounds)
                at_half_load(rounds, direct, systems, kinds, options)
        if "paced" in options.kinds:
            direct, *others = (dataclasses.replace(system, model=PACED_MODEL) for system in (direct, *others))
            with our_systems(options.systems, folder / "paced", model, prompt, rounds, GAP_S) as own:
                measure(rounds, direct, [*own, *others], [paced()], options.rounds)
    return rounds, missing


def paced() -> Load:
    """Return the load of streams whose words come one by one."""
    return Load(f"paced {COMPARED}", stream=True, clients=COMPARED)


def measure(rounds: Rounds, direct: System, systems: Sequence[System], loads: Sequence[Load], number: int) -> None:
    """Run that number of rounds, after some requests of each kind that do not count."""
    warm_up(rounds, (direct, *systems), loads)
    for step in rounds.run(direct, systems, loads, number):
        say(step)


def warm_up(rounds: Rounds, systems: Sequence[System], loads: Sequence[Load]) -> None:
    """Ask some requests of each kind that do not count. Raises RuntimeError if one is not answered as it should be."""
    for system in systems:
        for load in {load.stream: load for load in loads}.values():
            rounds.cell(system, dataclasses.replace(load, clients=COMPARED), min(WARM_UP, rounds.requests))
    if rounds.errors:
        raise RuntimeError(f"{len(rounds.errors)} wrong answers before anything was measured: {rounds.errors[0]}")


def at_half_load(
    rounds: Rounds, direct: System, systems: Sequence[System], kinds: Sequence[str], options: Namespace
) -> None:
    """Ask each system at half of the highest rate it showed, and the model alone at the same."""
    for number in range(1, options.rounds + 1):
        for kind in kinds:
            say(f"round {number} of {options.rounds}: {kind} half")
            for system in systems:
                shown = [(system.name, f"{kind} {clients}") for clients in options.clients]
                rates = [figures.per_s(rounds, *key) for key in shown if key in rounds.samples]
                if rates:
                    load = Load(f"{kind} half", kind == "stream", COMPARED, rate=max(rates) / 2)
                    rounds.keep(system, load, rounds.cell(direct, load))


@contextmanager
def our_systems(
    names: Sequence[str], folder: Path, model: Path, prompt: str, rounds: Rounds, gap_s: float = 0.0
) -> Iterator[list[System]]:
    """Start our installations, and see at the end that all they were asked is in the record."""
    with ExitStack() as stack:
        sites: dict[ours.Database, ours.OurSite] = {}
        systems = []
        for name in (name for name in OURS if name in names):
            database: ours.Database = "postgresql" if name == "ours-postgresql" else "sqlite"
            if database not in sites:
                made = ours.our_site(folder / database, model, prompt, database, gap_s)
                sites[database] = stack.enter_context(made)
            systems.append(sites[database].system(name, prompt if name == "ours-inline" else ""))
        before = dict(rounds.answered)
        yield systems
        if not rounds.errors:
            for site in sites.values():
                asked = [system.name for system in systems if system.parts is site.parts]
                site.check(sum(rounds.answered[name] - before.get(name, 0) for name in asked))


def system_prompt() -> str:
    """Return 4 KB of instructions as an agent has them."""
    profile = yaml.safe_load((ROOT / "profiles" / "contract-validator.yaml").read_text("utf-8"))
    text = str(profile["segments"][0]["text"])
    return (text * 2)[:PROMPT_BYTES]


def say(step: str) -> None:
    """Tell a person who waits what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {step}", flush=True)
