"""`honcho start` in a fresh clone: everything starts, serves, and ends in order."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tasks.settings import CONFIG_VARIABLE, PREFIX
from tests.conftest import new_key
from tests.services import RedisServer, free_port, wait_until

ROOT = Path(__file__).parents[3]
READY_S, END_S = 120.0, 90.0
#: honcho kills what is left this long after the first process has ended.
HONCHO_KILLS_S = 5.0
#: So the answer must take longer than that, and less than `scheduling.drain_s`, from when honcho is told to end.
WORDS, WORDS_A_SECOND = 66, 11
PROCESSES = {"release.1", "web.1", "worker.1", "housekeeping.1", "flower.1"}


@pytest.fixture
def clone(tmp_path: Path, tiny_model: Path, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder as a clone has it, for which this process is configured; what was started there is ended."""
    for name in ("Procfile", ".flaskenv", "celeryconfig.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    variables = {
        "REDIS_URL": own_redis.url,
        "DATABASE_URL": f"sqlite:///{tmp_path / 'var' / 'gateway.db'}",
        f"{PREFIX}GATEWAY__HOST": "127.0.0.1",
        f"{PREFIX}GATEWAY__PORT": str(free_port()),
        f"{PREFIX}SECRETS__DIRECTORY": str(tmp_path / "var" / "secrets"),
        f"{PREFIX}ENGINE__KIND": "simulated",
        f"{PREFIX}ENGINE__MODEL": str(tiny_model),
        f"{PREFIX}ENGINE__OPTIONS": f'{{"tokens_per_s_per_sequence": {WORDS_A_SECOND}, "answer_tokens": {WORDS}}}',
        "FLOWER_PORT": str(free_port()),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(CONFIG_VARIABLE)
    yield tmp_path
    for process in started_in(tmp_path):
        process.kill()


def started_in(folder: Path) -> list[psutil.Process]:
    """Return the processes whose working directory is a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_it_serves_and_drains(clone: Path) -> None:
    """SIGTERM comes in the middle of an answer, which is told to its end; then every process has ended well."""
    url = f"http://127.0.0.1:{os.environ[f'{PREFIX}GATEWAY__PORT']}"
    log = clone / "honcho.log"
    with log.open("wb") as output:
        honcho = subprocess.Popen(
            [sys.executable, "-m", "honcho", "--no-colour", "start"], cwd=clone, stdout=output, stderr=output
        )
    wait_until(lambda: ready(url), READY_S, "everything that readiness asks for")
    headers = {"Authorization": f"Bearer {new_key('default')}"}
    body = {"agent": "incident-responder", "directive": "What now?", "sampling": {"max_tokens": WORDS}}
    task = requests.post(f"{url}/v1/tasks", json=body, headers=headers, timeout=60).json()
    with requests.get(f"{url}{task['links']['events']}", headers=headers, stream=True, timeout=60) as stream:
        lines = stream.iter_lines(decode_unicode=True)
        assert next(line for line in lines if line.startswith("event:")) == "event: started"
        honcho.send_signal(signal.SIGTERM)
        events = [line for line in lines if line.startswith("event:")]
    assert events[-1] == "event: completed"
    assert events.count("event: delta") > WORDS_A_SECOND * HONCHO_KILLS_S, "it was short enough to end by itself"

    assert honcho.wait(END_S) == 128 + signal.SIGTERM
    said = log.read_text("utf-8")
    assert "SIGKILL" not in said, said
    ended = dict(line.split("| ")[1].split(" stopped ") for line in said.splitlines() if " stopped (rc=" in line)
    assert ended == dict.fromkeys(PROCESSES, "(rc=0)") | {"release.1": f"(rc={128 + signal.SIGTERM})"}
    assert started_in(clone) == []


def ready(url: str) -> Any:
    """Tell whether nothing is missing."""
    try:
        return requests.get(f"{url}/readyz", timeout=30).json()["status"] == "ready"
    except (requests.ConnectionError, requests.Timeout):
        return False


def test_without_honcho_commands_take_the_shells_place(clone: Path) -> None:
    """As on a platform that has no honcho, and sends its signals to the command itself."""
    lines = dict(line.split(": ", 1) for line in (clone / "Procfile").read_text("utf-8").splitlines())
    assert {f"{name}.1" for name in lines} == PROCESSES
    for name, command in lines.items():
        program = "true" if name == "release" else command.rpartition("together} ")[2].split()[0]
        # Each program says which process it is.
        stand_in = clone / "bin" / program
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text("#!/bin/sh\necho $$ $PPID\n")
        (stand_in.parent / "flask").write_text("#!/bin/sh\n")
        for file in stand_in.parent.iterdir():
            file.chmod(0o755)
        environment = {"PATH": f"{stand_in.parent}{os.pathsep}/usr/bin{os.pathsep}/bin"}
        with subprocess.Popen(["/bin/sh", "-c", command], env=environment, stdout=subprocess.PIPE, text=True) as shell:
            out, _ = shell.communicate(timeout=END_S)
        assert shell.returncode == 0
        assert out.split() == ([] if name == "release" else [str(shell.pid), str(os.getpid())])
