"""The routers of others in front of the simulated engines, as their documentation has them run, one process each.

Their own times are stretched as the engines' are, so that a health check or an eviction comes as often, for each request, as it
would on real engines. What is not named here keeps its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.overheadlab import installing, peers
from bench.overheadlab.system import System
from bench.schedulinglab.http_client import Target
from bench.schedulinglab.http_engine import MODEL, Engines
from bench.schedulinglab.scenarios import PROFILE_TOKENS
from tests.services import free_port
from worker_gpu.engines.simulated_options import SimulationOptions

VLLM_ROUTER = "vllm-router==0.1.17"
#: Defaults of both, in seconds.
SECONDS = {
    "health-check-interval-secs": 60,
    "health-check-timeout-secs": 5,
    "request-timeout-secs": 1800,
    "queue-timeout-secs": 60,
    "cb-timeout-duration-secs": 60,
    "cb-window-duration-secs": 120,
}
MILLISECONDS = {"retry-initial-backoff-ms": 50, "retry-max-backoff-ms": 30_000}
#: When its tree is cut to size; the two differ.
SGLANG_EVICTION_S, VLLM_EVICTION_S = 60, 120
#: Both look for their engines again only every 30 seconds by default; that is before anything is measured.
START = {"worker-startup-check-interval": 1}
#: A profile, and the name of its role before it.
STATIC_TOKENS = 1 + PROFILE_TOKENS


def sglang(policy: str, urls: Sequence[str], scale: float) -> list[str]:
    """Return the command of SGLang's router."""
    python = installing.python_package(installing.SGLANG) / "python"
    times = _stretched({**SECONDS, "eviction-interval-secs": SGLANG_EVICTION_S}, scale)
    command = [str(python), "-m", "sglang_router.launch_router", "--policy", policy, "--log-level", "error"]
    return [*command, *times, "--worker-urls", *urls]


def vllm(policy: str, urls: Sequence[str], scale: float) -> list[str]:
    """Return the command of vLLM's router."""
    program = installing.python_package(VLLM_ROUTER) / "vllm-router"
    times = _stretched({**SECONDS, "eviction-interval-secs": VLLM_EVICTION_S}, scale)
    return [str(program), "--policy", policy, "--log-level", "error", *times, "--worker-urls", *urls]


PEERS: Mapping[str, tuple[Callable[[str, Sequence[str], float], list[str]], str]] = {
    "sglang-cache-aware": (sglang, "cache_aware"),
    "sglang-round-robin": (sglang, "round_robin"),
    "vllm-cache-aware": (vllm, "cache_aware"),
}


@contextmanager
def running(name: str, folder: Path, workers: int, options: SimulationOptions) -> Iterator[Target]:
    """Start a router, installed if it must be, in front of engines of its own. Raises NotInstalled."""
    folder.mkdir()
    make, policy = PEERS[name]
    with ExitStack() as stack:
        engines = stack.enter_context(Engines(workers, options))
        urls = [f"http://127.0.0.1:{port}" for port in engines.ports]
        port = free_port()
        command = make(policy, urls, options.time_scale)
        command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        system, process = peers.started(name, command, {}, folder, port, {}, "")
        stack.callback(process.kill)
        system = _with_engines(system, engines)
        peers.wait(system, process)
        yield Target(system, by_agent=False, static_tokens=STATIC_TOKENS)


def _with_engines(system: System, engines: Engines) -> System:
    parts = {"router": system.parts[system.name], "engines": [engines.process]}
    return dataclasses.replace(system, model=MODEL, parts=parts, answer="")


def _stretched(seconds: Mapping[str, int], scale: float) -> list[str]:
    times = {**seconds, **MILLISECONDS}
    words = {name: str(round(value * scale)) for name, value in times.items()} | {
        name: str(value) for name, value in START.items()
    }
    return [word for name, value in words.items() for word in (f"--{name}", value)]
