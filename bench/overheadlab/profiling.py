"""Flame graphs of the gateway and the worker while they are asked: where their processor time goes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.overheadlab import installing
from bench.overheadlab.rounds import Load, Rounds
from bench.overheadlab.system import System

PARTS = ("gateway", "worker")
SAMPLES_PER_S = 200
#: More requests than can be answered meanwhile.
ENDLESS = 4_000


def record(rounds: Rounds, system: System, loads: Sequence[Load], folder: Path) -> None:
    """Write `PART-LOAD.svg` into the folder for each part and load. py-spy slows what it looks at, so nothing is timed."""
    program = installing.python_package(installing.PY_SPY) / "py-spy"
    folder.mkdir(parents=True, exist_ok=True)
    for load in loads:
        with ExitStack() as stack:
            for part in PARTS:
                file = folder / f"{part}-{load.name.replace(' ', '-')}.svg"
                stack.enter_context(_watching(program, system.parts[part][0].pid, rounds.seconds, file))
            rounds.cell(system, load, ENDLESS)


@contextmanager
def _watching(program: Path, pid: int, seconds: float, file: Path) -> Iterator[None]:
    command = [str(program), "record", "--subprocesses", "--nonblocking", "--pid", str(pid), "--output", str(file)]
    command += ["--rate", str(SAMPLES_PER_S), "--duration", str(max(1, round(seconds)))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    try:
        yield
        output, _ = process.communicate(timeout=seconds + 60)
        if process.returncode:
            raise RuntimeError(f"py-spy cannot watch process {pid}: {output.strip()}")
    finally:
        process.kill()
        process.wait()
