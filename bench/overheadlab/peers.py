"""The other gateways as systems, as their own documentation has them run in production, one process each.

None of them has a queue or a record here: what that would cost them is not measured.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

from bench.chaoslab.lab import environment
from bench.chaoslab.process import Process
from bench.overheadlab import installing
from bench.overheadlab.system import PATH, System
from bench.overheadlab.upstream import MODEL, PACED_MODEL, TEXT
from tests.services import free_port

START_S = 120.0
_POLL_S = 0.2


def litellm(folder: Path, upstream_port: int, prompt: str) -> tuple[System, Process]:
    """Return LiteLLM's proxy: production mode, its own price list, no telemetry, errors only in its log."""
    port, key = free_port(), f"sk-{secrets.token_hex(16)}"
    upstream = {"api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"}
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", **upstream}} for name in (MODEL, PACED_MODEL)
    ]
    configuration = folder / "litellm.json"
    # YAML reads JSON.
    configuration.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": key}}), "utf-8")
    command = [str(installing.python_package(installing.LITELLM) / "litellm"), "--config", str(configuration)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    variables = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    headers = {"Authorization": f"Bearer {key}"}
    return started("litellm", command, variables, folder, port, headers, prompt)


def portkey(folder: Path, upstream_port: int, prompt: str) -> tuple[System, Process]:
    """Return Portkey's gateway, without its console. Each request names the provider and its address."""
    port = free_port()
    package = installing.node_package(installing.PORTKEY, installing.PORTKEY_VERSION, installing.PORTKEY_NEEDS)
    program = package / "build" / "start-server.js"
    command = [*installing.node_command(), str(program), f"--port={port}", "--headless"]
    headers = {
        "Authorization": "Bearer none",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"http://127.0.0.1:{upstream_port}/v1",
    }
    return started("portkey", command, {"NODE_ENV": "production"}, folder, port, headers, prompt)


def sglang(folder: Path, upstream_port: int, prompt: str) -> tuple[System, Process]:
    """Return SGLang's router, which is written in Rust and only routes: about the least that a hop can cost."""
    port = free_port()
    command = [str(installing.python_package(installing.SGLANG) / "python"), "-m", "sglang_router.launch_router"]
    command += ["--worker-urls", f"http://127.0.0.1:{upstream_port}", "--policy", "cache_aware"]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--prometheus-port",
        str(free_port()),
        "--log-level",
        "error",
    ]
    return started("sglang", command, {}, folder, port, {}, prompt)


PEERS: Mapping[str, Callable[[Path, int, str], tuple[System, Process]]] = {
    "litellm": litellm,
    "portkey": portkey,
    "sglang": sglang,
}


@contextmanager
def running(name: str, folder: Path, upstream_port: int, prompt: str) -> Iterator[System]:
    """Install and start a peer, and have it answer. Raises NotInstalled if it cannot be installed."""
    folder.mkdir()
    system, process = PEERS[name](folder, upstream_port, prompt)
    try:
        wait(system, process)
        yield system
    finally:
        process.kill()


def started(
    name: str,
    command: Sequence[str],
    variables: Mapping[str, str],
    folder: Path,
    port: int,
    headers: Mapping[str, str],
    prompt: str,
) -> tuple[System, Process]:
    """Start a peer that listens on `port`; it may not answer yet."""
    process = Process(name, command, {**environment(), **variables}, folder / "log", lambda _said: True)
    process.start()
    assert process.pid is not None  # noqa: S101  it has just been started
    parts = {name: [psutil.Process(process.pid)]}
    return System(name, port, MODEL, parts, headers, prompt, TEXT), process


def wait(system: System, process: Process) -> None:
    """Return once a question is answered. Raises RuntimeError with what it last said if it ends or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and not process.ended:
        try:
            url = f"http://127.0.0.1:{system.port}{PATH}"
            body = system.body("Are you there?", stream=False)
            if requests.post(url, json=body, headers=dict(system.headers), timeout=10).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(_POLL_S)
    raise RuntimeError(f"{system.name} does not answer: {process.last_words}")
