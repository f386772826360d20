"""No process of the engine outlives the worker that started it, whenever that worker is killed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from tests.measuring import COVERAGE_VARIABLES
from tests.tiny_model import make_tiny_model
from worker_gpu.engines import orphans

ROOT = Path(__file__).parents[3]
PR_GET_PDEATHSIG = 2  # From <linux/prctl.h>.
GONE_WITHIN_S = 5
START_WITHIN_S = 120
IMPORTING_S = 1.0  # By then EngineCore has begun to import vLLM, and is seconds from loading plugins.

#: A worker that only starts the engine. Each of the two ways into EngineCore is tried without the other.
WORKER = """
import asyncio, contextlib, sys
from tasks.settings import EngineGroup, Settings
from worker_gpu.engines import create_engine, vllm

async def main(model, way):
    if way == "plugin":
        vllm.bound_children = contextlib.nullcontext
    await create_engine(Settings(engine=EngineGroup(model=model, kv_cache_gib=0.25))).start()
    print("serving", flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def death_signal() -> int:
    """Return the signal this process gets when its parent dies; 0 is none."""
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(value), 0, 0, 0)
    return value.value


def tell_death_signal(pipe: Connection, generations: int) -> None:
    """Send this process's death signal, or that of a descendant."""
    if generations:
        pipe.send(signal_of_child(generations - 1))
    else:
        pipe.send(death_signal())


def tell_plugins_effect(pipe: Connection) -> None:
    """Send the death signal after the plugin has run; by the second time it has seen this process host the engine."""
    orphans.die_with_parent()
    first = death_signal()
    ctypes.CDLL(None).prctl(orphans.PR_SET_PDEATHSIG, 0, 0, 0, 0)
    with orphans.bound_children():
        orphans.die_with_parent()
    pipe.send((first, death_signal()))


def signal_of_child(generations: int) -> int:
    """Spawn a child and return what it tells."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=tell_death_signal, args=(there, generations))
    child.start()
    assert here.poll(30)
    value: int = here.recv()
    child.join()
    return value


@pytest.mark.parametrize(("bound", "expected"), [(True, signal.SIGKILL), (False, 0)])
@pytest.mark.parametrize("generations", [0, 1])
def test_spawned_descendants_are_bound(bound: bool, expected: int, generations: int) -> None:
    """Children and their children get the signal; those spawned outside the block do not."""
    with orphans.bound_children() if bound else nullcontext():
        assert signal_of_child(generations) == expected


def test_plugin_binds_children_but_not_the_host() -> None:
    """A process that multiprocessing started is bound, unless it hosts the engine itself."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=tell_plugins_effect, args=(there,))
    child.start()
    assert here.poll(30)
    assert here.recv() == (signal.SIGKILL, 0)
    child.join()


def test_plugin_does_nothing_in_an_ordinary_process() -> None:
    """This process was not started by multiprocessing."""
    before = death_signal()
    orphans.die_with_parent()
    assert death_signal() == before


def test_child_whose_parent_is_dead_already_ends() -> None:
    """Its parent is another process than the one it was started by."""
    code = f"from worker_gpu.engines import orphans; orphans._die_with({os.getpid()} + 1); print('alive')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")


@contextmanager
def worker(tmp_path: Path, way: str) -> Iterator[subprocess.Popen[str]]:
    """Run the worker above, with the plugin visible whether or not the project is installed."""
    plugin = tmp_path / "path" / "metaqore_gateway-0.dist-info" / "entry_points.txt"
    plugin.parent.mkdir(parents=True)
    plugin.write_text("[vllm.general_plugins]\nmetaqore_no_orphans = worker_gpu.engines.orphans:die_with_parent\n")
    (plugin.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: metaqore-gateway\nVersion: 0\n")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    model = make_tiny_model(tmp_path / "model")
    # It is killed in the end: whatever coverage measured in it would be lost.
    environment = {name: value for name, value in os.environ.items() if name not in COVERAGE_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join([str(plugin.parents[1]), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, str(script), str(model), way],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def kill_and_find_survivors(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Kill the worker and return which of its descendants are alive some seconds later; these are killed then."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert descendants
    process.send_signal(signal.SIGKILL)
    survivors = orphans.still_running(descendants, GONE_WITHIN_S)
    for survivor in survivors:
        survivor.kill()
    return survivors


def engine_process_appears(process: subprocess.Popen[str]) -> bool:
    """Wait until the worker has spawned EngineCore; its first seconds are imports."""
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        for child in psutil.Process(process.pid).children():
            if any("spawn_main" in argument for argument in child.cmdline()):
                return True
        time.sleep(0.05)
    return False


@pytest.mark.vllm
def test_killed_while_starting(tmp_path: Path) -> None:
    """EngineCore ends though it has loaded no plugin yet."""
    with worker(tmp_path, "bond") as process:
        assert engine_process_appears(process)
        time.sleep(IMPORTING_S)
        assert kill_and_find_survivors(process) == []


@pytest.mark.vllm
def test_killed_while_serving(tmp_path: Path) -> None:
    """EngineCore ends by the plugin alone."""
    with worker(tmp_path, "plugin") as process:
        assert process.stdout is not None
        assert any(line == "serving\n" for line in process.stdout)
        assert kill_and_find_survivors(process) == []
