"""Who runs on which core. On a machine without an accelerator the engine gets one for itself, and all else the others.

Both sides then have the same: an engine that computes on one core, and others for whatever surrounds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import psutil

#: What vLLM calls the process that computes.
ENGINE_CORE = "EngineCore"


def engine_core() -> int:
    """Return the core that engines are to have: the last one this process may use."""
    return max(os.sched_getaffinity(0))


def engine_variables(core: int) -> dict[str, str]:
    """Return what makes vLLM compute with one thread, on that core."""
    return {"VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"}


def place(processes: Iterable[psutil.Process], core: int) -> int:
    """Bind these processes and their descendants, engines to `core`, all else to the others; return how many engines.

    Threads and processes that they start later inherit where they run.
    """
    others = {found for found in range(os.cpu_count() or 1) if found != core} or {core}
    engines = 0
    family = [one for process in processes for one in (process, *process.children(recursive=True))]
    for process in family:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            is_engine = any(ENGINE_CORE in word for word in (process.name(), *process.cmdline()))
            engines += is_engine
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core} if is_engine else others)
    return engines
