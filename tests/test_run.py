"""What `bin/run` runs, for real and from outside: it starts, serves, is killed in every part, and leaves nothing."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway_app.local.client import Client, RequestFailed
from tasks.settings import PREFIX
from tests.local_gateway import LocalGateway, poll, text_of
from tests.services import wait_until

#: Long enough for a worker's import, its model, and a lease that has to end first, on a busy machine.
RECOVERY_S = 30.0
TASKS_END_S = 60.0
#: What a client is told when the gateway cannot take a task, and it should come back.
COME_BACK = ("queue_unavailable", "database_unavailable", "service_unavailable")
TERMINAL = {"completed", "failed", "cancelled", "expired", "vetoed", "dead"}


@pytest.fixture
def gateway(tmp_path: Path, tiny_model: Path) -> Iterator[LocalGateway]:
    """Return a gateway in an empty project folder, not started yet."""
    gateway = LocalGateway(tmp_path / "project with spaces", tiny_model)
    try:
        yield gateway
    finally:
        gateway.kill_everything()


def test_it_serves_refuses_a_second_and_ends_on_ctrl_c(gateway: LocalGateway) -> None:
    """One start to Ctrl-C: what an earlier one left gives its port back, a task is answered, a second is refused."""
    left = left_listening(gateway)
    client = gateway.start_ready()
    assert left.wait(RECOVERY_S) == -signal.SIGTERM
    assert "ended a web that an earlier start had left running" in gateway.output
    assert gateway.url == f"http://127.0.0.1:{gateway.usual_port}"
    task = submit(client)
    frames = list(client.events(task["links"]["events"]))
    assert [frames[0].name, frames[-1].name] == ["started", "completed"]
    assert poll(client, task)["result"]["text"] == text_of(frames)

    refused = gateway.start_another()
    assert refused.returncode == 1
    assert f"process {gateway.pid}, {gateway.url}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert client.missing() == [], "the first is still there"

    began = time.monotonic()
    os.kill(gateway.pid, signal.SIGINT)
    assert gateway.ends() == 0
    assert time.monotonic() - began < 10
    assert sorted(file.name for file in gateway.folder.run.iterdir()) == ["lock"]
    assert "Traceback" not in gateway.output


def test_a_taken_port_is_left_to_its_owner(gateway: LocalGateway) -> None:
    """Where the usual port is taken another one is, unless it was asked for. A terminal's Ctrl-C reaches a group."""
    with socket.create_server(("127.0.0.1", gateway.usual_port)):
        gateway.start(**{f"{PREFIX}GATEWAY__PORT": str(gateway.usual_port)})
        assert gateway.ends() == 1
        assert f"port {gateway.usual_port} of 127.0.0.1 is taken" in gateway.output
        assert "Traceback" not in gateway.output

        client = gateway.start_ready()
        assert gateway.url != f"http://127.0.0.1:{gateway.usual_port}"
        assert gateway.url in gateway.output
        assert list(client.events(submit(client)["links"]["events"]))[-1].name == "completed"
        os.killpg(gateway.pid, signal.SIGINT)
        assert gateway.ends() == 0


def test_killing_the_supervisor_leaves_nothing(gateway: LocalGateway) -> None:
    """`kill -9` of it, while a client reads a stream: its processes end by themselves, and the next start has the data."""
    slow = {f"{PREFIX}ENGINE__OPTIONS": '{"time_scale": 300}'}
    client = gateway.start_ready(**slow)
    task = submit(client)
    stream = client.events(task["links"]["events"])
    assert next(stream).name == "started"
    os.kill(gateway.pid, signal.SIGKILL)
    wait_until(lambda: gateway.family() == [], 10, "the end of every process")
    assert (gateway.folder.run / "web.pid").exists(), "nobody was there to remove it"

    client = gateway.start_ready()
    assert gateway.url == f"http://127.0.0.1:{gateway.usual_port}"
    frames = list(client.events(task["links"]["events"]))
    assert frames[-1].name == "completed"
    assert text_of(frames) == poll(client, task)["result"]["text"]
    assert gateway.kinds()[task["id"]] == {"received": 1, "admitted": 1, "started": 2, "completed": 1}
    os.kill(gateway.pid, signal.SIGTERM)
    assert gateway.ends() == 0


def test_once_shows_two_answers_and_their_records(gateway: LocalGateway) -> None:
    """`--once` exits 0 on the simulated engine, having printed both answers, their audit rows and the times."""
    gateway.start("--once")
    assert gateway.ends() == 0
    printed = gateway.output
    assert "profile cold" in printed
    assert "profile cached" in printed
    assert len(gateway.kinds()) == 2
    for request_id in gateway.kinds():
        rows = [line.split() for line in printed.splitlines() if request_id in line]
        assert [row[1] for row in rows] == ["received", "admitted", "started", "completed"]
    assert "of them cached" in printed
    assert "Traceback" not in printed


def test_once_interrupted_is_no_success(gateway: LocalGateway) -> None:
    """A script that waits for `--once` must not take its interruption for a success. It ends long before it is ready."""
    gateway.start("--once")
    wait_until(lambda: gateway.child("worker"), RECOVERY_S, "services being started")
    began = time.monotonic()
    os.kill(gateway.pid, signal.SIGINT)
    assert gateway.ends() == 128 + signal.SIGINT
    assert time.monotonic() - began < 10
    assert "error" not in gateway.output


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({f"{PREFIX}GATEWAY__PRT": "1"}, "METAQORE_GATEWAY__PRT is no setting; did you mean METAQORE_GATEWAY__PORT?"),
        ({f"{PREFIX}GATEWAY__HOST": "192.0.2.1"}, "gateway.host 192.0.2.1 is no address of this machine"),
    ],
)
def test_a_setting_that_cannot_work_is_named(gateway: LocalGateway, variables: dict[str, str], message: str) -> None:
    """A bad setting ends the start with one clear message."""
    gateway.start(**variables)
    assert gateway.ends() == 1
    assert message in gateway.output
    assert "Traceback" not in gateway.output


def test_an_unusable_var_is_named(gateway: LocalGateway) -> None:
    """Where `var/` cannot be made, or its database is none, the start says so."""
    gateway.folder.path.write_text("not a folder")
    gateway.start()
    assert gateway.ends() == 1
    assert f"error: {gateway.folder.path} cannot be used: File exists" in gateway.output
    gateway.folder.path.unlink()
    gateway.folder.path.mkdir()
    (gateway.folder.path / "gateway.db").write_bytes(os.urandom(8192))
    gateway.start()
    assert gateway.ends() == 1
    assert "error: the database cannot be migrated: file is not a database" in gateway.output
    assert "Traceback" not in gateway.output


def test_any_process_may_die_at_any_instant(gateway: LocalGateway) -> None:
    """Each process is killed, most of them twice, in random order, while tasks come in: each accepted one is completed exactly once."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    # Slow enough that some are always running; tried as often as it takes, as giving up is another test's subject.
    options = {"ENGINE__OPTIONS": '{"time_scale": 10}', "SCHEDULING__MAX_ATTEMPTS": "20"}
    client = gateway.start_ready(**{f"{PREFIX}{name}": value for name, value in options.items()})
    submitter = Submitter(client)
    submitter.start()
    try:
        victims = [*["redis", "web", "web's child", "worker"] * 2, "housekeeper"]
        chance.shuffle(victims)
        for victim in victims:
            time.sleep(chance.uniform(0, 1.5))  # The instant is what is random.
            kill_and_await_another(gateway, victim)
        wait_until(lambda: client.missing() == [], RECOVERY_S, "a gateway that is ready again")
        enough = len(submitter.accepted) + 5
        wait_until(lambda: len(submitter.accepted) >= enough, RECOVERY_S, "tasks accepted after the last kill")
    finally:
        submitter.stop()
    assert submitter.refused == []

    def unfinished() -> list[str]:
        kinds = gateway.kinds()
        return [request_id for request_id in submitter.accepted if not TERMINAL & kinds[request_id].keys()]

    try:
        wait_until(lambda: not unfinished(), TASKS_END_S, "the end of every accepted task")
    except TimeoutError:
        pytest.fail(f"seed {seed}: of {len(submitter.accepted)} tasks these never ended: {unfinished()}")
    kinds = gateway.kinds()
    for request_id, task in submitter.accepted.items():
        ends = {kind: count for kind, count in kinds[request_id].items() if kind in TERMINAL}
        assert ends == {"completed": 1}, f"seed {seed}: {request_id} has {kinds[request_id]}"
        frames = list(client.events(task["links"]["events"]))
        assert text_of(frames) == poll(client, task)["result"]["text"], f"seed {seed}: {request_id}"
    print(f"{len(submitter.accepted)} tasks; {sum(kinds[i]['started'] for i in submitter.accepted)} attempts")
    os.kill(gateway.pid, signal.SIGINT)
    assert gateway.ends() == 0


class Submitter(threading.Thread):
    """Submits tasks all the time, each again until it is accepted, as a client does that means it."""

    def __init__(self, client: Client) -> None:
        super().__init__(name="submitter", daemon=True)
        self.accepted: dict[str, dict[str, Any]] = {}
        self.refused: list[str] = []
        self._client = client
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                task = submit(self._client)
                self.accepted[task["id"]] = task
            except (OSError, HTTPException, ValueError):
                pass
            except RequestFailed as refusal:
                if not str(refusal).startswith(COME_BACK):
                    self.refused.append(str(refusal))
            self._stopped.wait(0.1)

    def stop(self) -> None:
        """Submit no more; return once nothing is under way."""
        self._stopped.set()
        self.join()


def left_listening(gateway: LocalGateway) -> subprocess.Popen[bytes]:
    """Leave a process on the usual port, as a start does that was killed together with the kernel's patience."""
    program = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"
    gateway.folder.make()
    left = subprocess.Popen(
        [sys.executable, "-c", program, str(gateway.usual_port)], cwd=gateway.root, start_new_session=True
    )
    (gateway.folder.run / "web.pid").write_text(f"{left.pid}\n")
    wait_until(lambda: listens(gateway.usual_port), RECOVERY_S, "the process to listen")
    # Its parent, this test, has to ask for its exit status, or it stays in the list of processes.
    threading.Thread(target=left.wait, daemon=True).start()
    return left


def listens(port: int) -> bool:
    """Tell whether someone takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def kill_and_await_another(gateway: LocalGateway, victim: str) -> None:
    """Kill a process as the kernel would, and wait until another has taken its place."""

    def another() -> psutil.Process | None:
        found = process_of(gateway, victim)
        return found if found != process else None

    process: psutil.Process | None = None
    process = wait_until(another, RECOVERY_S, f"the process of {victim}")
    if process is not None:
        process.kill()
    wait_until(another, RECOVERY_S, f"another process of {victim}")


def process_of(gateway: LocalGateway, victim: str) -> psutil.Process | None:
    """Return a running process by what it is, or None while there is none."""
    if victim != "web's child":
        return gateway.child(victim)
    try:
        children = web.children() if (web := gateway.child("web")) else []
        return next((child for child in children if child.status() != psutil.STATUS_ZOMBIE), None)
    except psutil.NoSuchProcess:
        return None


def submit(client: Client) -> dict[str, Any]:
    """Submit a short task."""
    return client.submit({"agent": "incident-responder", "directive": "What now?", "sampling": {"max_tokens": 12}})
