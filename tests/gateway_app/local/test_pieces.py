"""The pieces of `bin/run`: what lies in `var/`, who holds it, ports, the environment of a second terminal."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from gateway_app.local import ports, processes, secrets, services
from gateway_app.local.environment import Environment, decide
from gateway_app.local.folder import LOG_LIMIT_BYTES, AlreadyRunning, Folder, write_holder
from gateway_app.local.ports import NEARBY, PortTaken, free_port
from tasks.errors import ConfigurationError
from tasks.settings import KEY_BYTES, PREFIX, SECRET_NAMES, Settings
from tests.services import free_port as some_port
from tests.services import wait_until

ROOT = Path(__file__).parents[3]
WAIT_S = 10.0
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
#: Says that it runs; makes a file when SIGTERM reaches it, and ends.
SAVING = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def environment() -> Environment:
    """Return the addresses of a start, with characters that shells take for their own."""
    return Environment("127.0.0.1", 8081, "redis://:pass'word $(x)@127.0.0.1:6380/0", 6380, "pw", "sqlite:////a b/c.db")


# --- The folder ------------------------------------------------------------------------------------


def test_only_the_owner_may_read(tmp_path: Path, environment: Environment) -> None:
    """Folders have mode 700 and files 600, whatever the umask allows, and an older `var/` is closed."""
    (tmp_path / "var").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        folder = Folder(tmp_path)
        folder.make()
        with folder.lock():
            folder.open_log("web").close()
            environment.write(folder)
            secrets.create_secrets(folder.secrets)
            services.all_services(folder, environment, "metaqore:")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder.path, *folder.path.rglob("*"))}
    assert {path: oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}
    assert len(modes) >= 12


def test_making_it_again_changes_nothing(folder: Folder) -> None:
    """What lies in it stays."""
    folder.api_key.write_text("key")
    folder.make()
    assert folder.api_key.read_text() == "key"


def test_a_full_disk_is_refused(folder: Folder) -> None:
    """Less space than is needed ends the start, with both numbers."""
    with pytest.raises(ConfigurationError, match=r"only \d+ MB are free in .*/var, and running needs 1000000000 MB"):
        folder.make(needed_mb=10**9)


def test_a_var_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """The message says what is in the way."""
    (tmp_path / "var").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used: File exists"):
        Folder(tmp_path).make()
    with pytest.raises(ConfigurationError, match="cannot be used: No such file or directory"):
        Folder(tmp_path / "absent").make()


def test_a_replaced_file_is_never_seen_half_written(folder: Folder) -> None:
    """The old content stays until the new one is whole."""
    path = folder.run / "value"
    folder.write_private(path, "old")
    with path.open() as reader:
        folder.write_private(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert list(folder.run.iterdir()) == [path]


def test_a_large_log_is_put_aside(folder: Folder) -> None:
    """At the next start, in place of the one that was put aside before; a small one is kept."""
    log = folder.log("web")
    folder.rotate_log("web")
    for content in (b"a", b"b"):
        with folder.open_log("web") as file:
            file.write(content * (LOG_LIMIT_BYTES + 1))
        folder.rotate_log("web")
        assert not log.exists()
        assert log.with_name("web.log.1").read_bytes()[:1] == content
    log.write_bytes(b"c" * LOG_LIMIT_BYTES)
    folder.rotate_log("web")
    assert log.exists()


def test_the_tail_of_a_log(folder: Folder) -> None:
    """The last twenty lines, whatever bytes are in them; nothing where there is no log."""
    assert folder.log_tail("web") == ""
    folder.log("web").write_bytes(b"\n".join(b"line %d \xff" % number for number in range(30)))
    lines = folder.log_tail("web").splitlines()
    assert (len(lines), lines[0], lines[-1]) == (20, "    line 10 \ufffd", "    line 29 \ufffd")


# --- The lock --------------------------------------------------------------------------------------


def test_a_second_holder_is_told_of_the_first(folder: Folder) -> None:
    """The message names process and URL, once there is one."""
    with folder.lock() as lock:
        with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}, still starting"), folder.lock():
            pass
        write_holder(lock, "http://127.0.0.1:8080")
        with pytest.raises(AlreadyRunning) as refusal, folder.lock():
            pass
    message = f"the gateway is already running in {folder.root}: process {os.getpid()}, http://127.0.0.1:8080"
    assert refusal.value.detail == message
    with folder.lock():
        pass


def test_a_killed_holder_holds_nothing(folder: Folder) -> None:
    """The kernel gives the lock back, and what the dead one wrote into it is not believed."""
    program = "import sys, time; from pathlib import Path; from gateway_app.local.folder import Folder\n"
    program += "with Folder(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", program, str(folder.root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyRunning, match=f"process {holder.pid}"), folder.lock():
            pass
        holder.kill()
        holder.wait()
    with folder.lock() as lock:
        lock.seek(0)
        assert json.loads(lock.read()) == {"pid": os.getpid(), "url": None}


@pytest.mark.parametrize("content", ["", "not json", "[]", "3", "{}", '{"pid": 1}'])
def test_a_lock_without_a_name_still_locks(folder: Folder, content: str) -> None:
    """Whatever stands in the file, the message is one a user can read."""
    with folder.lock() as lock:
        lock.truncate(0)
        lock.write(content)
        lock.flush()
        with pytest.raises(AlreadyRunning, match="already running"), folder.lock():
            pass


# --- Processes of an earlier start -----------------------------------------------------------------


@pytest.fixture
def left(folder: Folder) -> Iterator[subprocess.Popen[bytes]]:
    """Return a process that some earlier start may have left in the project's folder."""
    command = [sys.executable, "-c", SAVING]
    with subprocess.Popen(command, cwd=folder.root, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_a_left_process_is_ended(folder: Folder, left: subprocess.Popen[bytes]) -> None:
    """With its pid file, and by SIGTERM, so that it may save what it has."""
    file = pid_file(folder, left.pid)
    assert processes.end_all_stale(folder.run, folder.root) == ["web"]
    assert not psutil.pid_exists(left.pid)
    assert (folder.root / "saved").exists()
    assert not file.exists()
    assert processes.end_all_stale(folder.run, folder.root) == []


def test_a_left_process_that_ignores_it_is_killed(
    folder: Folder, left: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process takes no SIGTERM, so it is killed after a while, as is what it has started."""
    monkeypatch.setattr(processes, "STALE_STOP_S", 0.2)
    psutil.Process(left.pid).suspend()
    assert processes.end_stale(pid_file(folder, left.pid), folder.root)
    left.wait(WAIT_S)
    assert not (folder.root / "saved").exists()


def test_a_process_of_another_folder_is_left_alone(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The number in an old pid file may belong to anyone by now."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with subprocess.Popen(SLEEP, cwd=elsewhere, start_new_session=True) as foreign:
        try:
            spared(folder, pid_file(folder, foreign.pid), foreign)
        finally:
            foreign.kill()


def test_a_process_of_another_time_is_left_alone(folder: Folder, left: subprocess.Popen[bytes]) -> None:
    """One that was started long before or after the file was written is not the one it names: an editor, a shell."""
    file = pid_file(folder, left.pid)
    for shift_s in (-3600, 3600):
        file.write_text(f"{left.pid}\n")
        os.utime(file, (time.time() + shift_s,) * 2)
        spared(folder, file, left)


@pytest.mark.parametrize("content", ["", "x", "-1", "0", "999999999", "99999999999999999999"])
def test_a_broken_pid_file_is_removed(folder: Folder, content: str) -> None:
    """It names nobody."""
    file = folder.run / "web.pid"
    file.write_text(content)
    assert not processes.end_stale(file, folder.root)
    assert not file.exists()


def pid_file(folder: Folder, pid: int) -> Path:
    """Write a pid file as a start does."""
    file = folder.run / "web.pid"
    file.write_text(f"{pid}\n")
    return file


def spared(folder: Folder, file: Path, process: subprocess.Popen[bytes]) -> None:
    """Check that the file is removed and the process goes on."""
    assert not processes.end_stale(file, folder.root)
    assert not file.exists()
    assert process.poll() is None


# --- Ports -----------------------------------------------------------------------------------------


def test_the_usual_port_is_taken_where_it_is_free() -> None:
    """Asked for or not."""
    port = some_port()
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", port, exactly=True) == port


@pytest.mark.parametrize("owner", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_gives_way_to_one_nearby(owner: str) -> None:
    """Wherever its owner listens: on this address or on all."""
    with socket.create_server((owner, some_port())) as server:
        taken = server.getsockname()[1]
        assert taken < free_port("127.0.0.1", taken) < taken + NEARBY
        with pytest.raises(PortTaken, match=f"port {taken} of 127.0.0.1 is taken") as refusal:
            free_port("127.0.0.1", taken, exactly=True)
        assert "METAQORE_GATEWAY__PORT" in refusal.value.hint


def test_one_that_was_just_in_use_counts_as_free() -> None:
    """Connections that are still being closed do not keep a server from listening."""
    with socket.create_server(("127.0.0.1", some_port())) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
    accepted.close()
    client.close()
    assert free_port("127.0.0.1", port, exactly=True) == port


def test_a_promised_port_is_not_given_twice() -> None:
    """Redis does not get the port that the gateway was promised."""
    port = some_port()
    assert port < free_port("127.0.0.1", port, promised=[port]) < port + NEARBY


def test_where_none_is_near_others_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a range that no client port is taken from; and at the end of all there is a message."""
    monkeypatch.setattr(ports, "_is_free", lambda _host, port: port == ports.OTHERS[7])
    assert free_port("127.0.0.1", 65_530) == ports.OTHERS[7]
    monkeypatch.setattr(ports, "_is_free", lambda _host, _port: False)
    with pytest.raises(PortTaken, match=r"no port of 127\.0\.0\.1 near 65535 is free"):
        free_port("127.0.0.1", 65_535)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_named(host: str) -> None:
    """It is not the port that is in the way."""
    with pytest.raises(ConfigurationError, match=f"{host} is no address of this machine"):
        free_port(host, some_port())


# --- The environment -------------------------------------------------------------------------------


def test_services_are_ours_unless_the_operator_names_them(folder: Folder) -> None:
    """Redis with a password on loopback, SQLite in `var/`; else what REDIS_URL and DATABASE_URL say."""
    ours = decide(settings_of({}), folder, {})
    assert ours.host == "127.0.0.1"
    assert ours.redis_port is not None
    assert len(ours.redis_password or "") >= 32
    assert ours.redis_url == f"redis://:{ours.redis_password}@127.0.0.1:{ours.redis_port}/0"
    assert ours.database_url == f"sqlite:///{folder.root}/var/gateway.db"
    assert decide(settings_of({}), folder, {"REDIS_URL": ""}).redis_password == ours.redis_password, "it is kept"
    url = "redis://elsewhere:6379/3"
    theirs = decide(
        settings_of({"gateway": {"request_queue_url": url}, "database": {"url": "postgresql://db/x"}}),
        folder,
        {"REDIS_URL": url, "DATABASE_URL": "postgresql://db/x"},
    )
    assert (theirs.redis_url, theirs.redis_port, theirs.database_url) == (url, None, "postgresql+psycopg://db/x")
    names = [service.name for service in services.all_services(folder, theirs, "metaqore:")]
    assert names == ["web", "housekeeper", "worker"]


def test_the_port_that_redis_usually_has_may_be_the_gateways(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then Redis takes another."""
    monkeypatch.setattr("gateway_app.local.environment.REDIS_PORT", port := some_port())
    found = decide(settings_of({"gateway": {"port": port}}), folder, {f"{PREFIX}GATEWAY__PORT": str(port)})
    assert (found.port, found.redis_port != port) == (port, True)


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8081"), ("::", "http://[::1]:8081"), ("::1", "http://[::1]:8081")],
)
def test_the_url_is_one_to_connect_to(host: str, url: str) -> None:
    """Addresses to listen on are none to connect to."""
    assert Environment(host, 8081, "", None, None, "").url == url


def test_where_the_metrics_are(folder: Folder) -> None:
    """A free port for each process that has none of its own; the gateway's are with it unless it is to have one too."""
    port = some_port()
    found = decide(settings_of({"metrics": {"worker_port": port, "housekeeper_port": port}}), folder, {})
    ports = (found.worker_metrics_port, found.housekeeper_metrics_port)
    assert port <= ports[0] < ports[1]
    urls = [f"{found.url}/metrics", *(f"http://127.0.0.1:{each}/metrics" for each in ports)]
    assert found.metrics_urls == urls
    assert found.variables()[f"{PREFIX}METRICS__HOUSEKEEPER_PORT"] == str(ports[1])
    apart = decide(
        settings_of({"metrics": {"worker_port": 0, "housekeeper_port": 0, "gateway_port": port}}), folder, {}
    )
    own = apart.gateway_metrics_port
    assert apart.metrics_urls == [f"http://127.0.0.1:{own}/metrics"]
    assert apart.variables()[f"{PREFIX}METRICS__GATEWAY_PORT"] == str(own)
    assert apart.variables()[f"{PREFIX}METRICS__WORKER_PORT"] == "0"
    assert decide(settings_of({"metrics": {"gateway_port": 0}}), folder, {}).metrics_urls[0] != f"{found.url}/metrics"


def test_a_shell_reads_the_environment(folder: Folder, environment: Environment) -> None:
    """What `set -a; . var/run/env` gives is what the processes have, with the settings that the start was given."""
    given = {
        f"{PREFIX}ENGINE__OPTIONS": '{"a": "it\'s $HOME `x`\nnext"}',
        f"{PREFIX}SECRETS__MASTER_KEY": "k",
        "HOME": "/",
    }
    environment.write(folder, given)
    shell = 'set -a; . var/run/env; set +a; exec "$0" -c "import json, os; print(json.dumps(dict(os.environ)))"'
    answer = subprocess.run(
        ["/bin/sh", "-eu", "-c", shell, sys.executable], cwd=folder.root, env={}, stdout=subprocess.PIPE, check=True
    )
    read = json.loads(answer.stdout)
    assert environment.variables().items() <= read.items()
    assert read[f"{PREFIX}ENGINE__OPTIONS"] == given[f"{PREFIX}ENGINE__OPTIONS"]
    assert f"{PREFIX}SECRETS__MASTER_KEY" not in read
    assert (folder.run / "gateway.port").read_text() == "8081\n"


def test_children_compile_what_they_import(environment: Environment) -> None:
    """And get everything else as it was given."""
    found = environment.for_children({"PYTHONDONTWRITEBYTECODE": "1", "LANG": "C", "REDIS_URL": "old"})
    assert "PYTHONDONTWRITEBYTECODE" not in found
    assert (found["LANG"], found["REDIS_URL"]) == ("C", environment.redis_url)


def test_redis_finds_its_folder_under_any_name(tmp_path: Path, environment: Environment) -> None:
    """Spaces, quotes and backslashes in the project's path are no trouble."""
    folder = Folder(tmp_path / 'a "b" \\c')
    folder.root.mkdir()
    folder.make()
    port = some_port()
    ours = Environment("127.0.0.1", 1, f"redis://:pw@127.0.0.1:{port}/0", port, "pw", "")
    redis = services.all_services(folder, ours, "metaqore:")[0]
    assert redis.answers is not None
    assert not redis.answers()
    with subprocess.Popen(redis.command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(redis.answers, WAIT_S, "Redis")
        finally:
            process.terminate()
    assert (folder.path / "redis" / "appendonly.aof").exists()


# --- Secrets ---------------------------------------------------------------------------------------


def test_secrets_are_made_once_and_kept(tmp_path: Path) -> None:
    """Every secret has 32 bytes, none is like another, and a second start makes none."""
    directory = tmp_path / "secrets"
    assert secrets.create_secrets(directory) == [*SECRET_NAMES, "flower_password"]
    made = {name: (directory / name).read_text() for name in SECRET_NAMES}
    assert {len(bytes.fromhex(text)) for text in made.values()} == {KEY_BYTES}
    assert len(set(made.values())) == len(SECRET_NAMES)
    (directory / "signing_key").unlink()
    assert secrets.create_secrets(directory) == ["signing_key"]
    assert {
        name: (directory / name).read_text() for name in SECRET_NAMES if name != "signing_key"
    }.items() <= made.items()
    assert names_in(directory) == sorted([*SECRET_NAMES, "flower_password"])
    assert len((directory / "flower_password").read_text().strip()) == 24, "18 random bytes, in base64"


def test_a_secret_that_exists_is_never_written_over(tmp_path: Path) -> None:
    """Not even one that came to be between the look and the writing."""
    path = tmp_path / "key"
    path.write_text("first")
    assert not secrets.write_once(path, "second")
    assert path.read_text() == "first"
    assert names_in(tmp_path) == ["key"]


def test_of_two_at_once_one_wins(tmp_path: Path) -> None:
    """Eight make the same secret; one of them does, and all read the same whole value afterwards."""
    path, barrier = tmp_path / "key", threading.Barrier(8)

    def make_and_read(number: int) -> tuple[bool, str]:
        barrier.wait(WAIT_S)
        return secrets.write_once(path, str(number) * 64), path.read_text()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(make_and_read, range(8)))
    assert sum(won for won, _ in results) == 1
    assert {text for _, text in results} == {path.read_text()}
    assert names_in(tmp_path) == ["key"]


def test_a_secret_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full or the machine dies, there is no file of that name, and nothing else stays."""

    def full(_descriptor: int) -> None:
        assert not (tmp_path / "key").exists(), "it has its name before it is on the disk"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        secrets.write_once(tmp_path / "key", "value")
    assert names_in(tmp_path) == []
    monkeypatch.undo()
    assert secrets.write_once(tmp_path / "key", "value")


def names_in(directory: Path) -> list[str]:
    """Return the names of what lies in a folder, sorted."""
    return sorted(path.name for path in directory.iterdir())


def settings_of(values: dict[str, dict[str, object]]) -> Settings:
    """Return settings that differ from the defaults in these values."""
    return Settings.model_validate(values)
