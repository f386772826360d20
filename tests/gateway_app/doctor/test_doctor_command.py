"""`flask doctor` as an operator runs it, and what it finds on the host itself: files, limits, processes, secrets."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result
from flask.testing import FlaskClient

from gateway_app.doctor import host, metaqore, model, processes
from gateway_app.doctor import secrets as secrets_of_host
from gateway_app.doctor.cli import doctor
from gateway_app.doctor.examination import EXAMINATIONS, examine
from gateway_app.doctor.finding import Finding
from tasks.queueing.keys import QueueKeys
from tasks.settings import KEY_BYTES, PREFIX, settings
from tests.gateway_app.doctor.conftest import Find
from tests.metaqore_stand_in import StandIn
from tests.workers import ROOT

TASK = {"agent": "incident-responder", "directive": "What now?"}


def run(*arguments: str) -> Result:
    """Run the command on the settings as they are now."""
    settings.cache_clear()
    return CliRunner().invoke(doctor, arguments)


def findings(result: Result) -> dict[str, dict[str, Any]]:
    """Return what a run with --json found, by name."""
    return {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_an_installation(configured: None, secrets_directory: Path) -> None:
    """Without a worker it has something to say; nothing fails, so the status is 0; JSON and text say the same."""
    for path in secrets_directory.iterdir():
        path.chmod(0o600)
    result = run("--json")
    found = findings(result)
    assert {name for name, finding in found.items() if finding["status"] == "fail"} == set(), found
    assert (result.exit_code, found["workers"]["status"], found["migrations"]["status"]) == (0, "warn", "ok")
    text = run()
    assert text.exit_code == 0
    for name, finding in found.items():
        assert name in text.stdout
        assert finding["remedy"] in text.stdout
    assert " ok" in text.stdout.splitlines()[-1]
    quiet = run("--quiet")
    assert len(quiet.stdout.splitlines()) < len(text.stdout.splitlines())


def test_everything_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of it is told, within the time-outs, and no password is; the status is 1."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("REDIS_URL", f"redis://:hunter2@127.0.0.1:{port}/0")
        monkeypatch.setenv("DATABASE_URL", f"postgresql://gateway:hunter3@127.0.0.1:{port}/gateway")
        monkeypatch.setenv("METAQORE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv(f"{PREFIX}ENGINE__MODEL", str(tmp_path / "nothing"))
        monkeypatch.setenv(f"{PREFIX}SECRETS__DIRECTORY", str(tmp_path))
        began = time.monotonic()
        result = run("--json")
    found = findings(result)
    assert result.exit_code == 1
    assert time.monotonic() - began < 40
    for name in ("redis", "database", "metaqore", "model", "secret master_key"):
        assert found[name]["status"] == "fail", found[name]
    assert "hunter" not in result.output


def test_a_broken_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs none is looked at all the same."""
    monkeypatch.setenv(f"{PREFIX}GATEWAY__PROT", "1")
    found = findings(run("--json"))
    assert (found["configuration"]["status"], "PROT" in found["configuration"]["says"]) == ("fail", True)
    assert found["python"]["status"] == "ok"
    assert found["everything else"]["status"] == "unknown"


def test_usage() -> None:
    """A wrong option is an error of its own; --help explains."""
    assert run("--jason").exit_code == 2
    assert "exit status is 1" in " ".join(run("--help").stdout.split())


def test_what_hangs_or_fails_takes_nothing_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are told as unknown, and an error's text, which may hold a secret, is not."""

    def hangs(_settings: object) -> Any:
        time.sleep(5)
        yield Finding("never", "ok", "")

    def fails(_settings: object) -> Any:
        yield Finding("before", "ok", "")
        raise RuntimeError("hunter2")

    monkeypatch.setattr("gateway_app.doctor.examination.EXAMINATIONS", {"a": hangs, "b": fails, "c": host.examine})
    found = {finding.name: finding for finding in examine(settings(), deadline_s=1.0)}
    assert (found["a"].status, found["b"].status, found["before"].status) == ("unknown", "unknown", "ok")
    assert (found["python"].status, "hunter2" in str(found)) == ("ok", False)
    assert set(EXAMINATIONS) > {"redis", "database"}


def test_secret_files(find: Find, secrets_directory: Path) -> None:
    """Each is there, well formed and private, or it is told which is not."""
    for path in secrets_directory.iterdir():
        path.chmod(0o600)
    assert {finding.status for name, finding in find(secrets_of_host.examine).items() if "fits" not in name} == {"ok"}
    (secrets_directory / "master_key").chmod(0o604)
    (secrets_directory / "organization_salt").chmod(0o640)
    (secrets_directory / "signing_key").write_text("0123", "ascii")
    (secrets_directory / "key_pepper").unlink()
    secrets_directory.chmod(0o755)
    found = find(secrets_of_host.examine)
    assert (found["secret master_key"].status, found["secret master_key"].remedy.split()[:2]) == (
        "fail",
        ["chmod", "600"],
    )
    assert [found[f"secret {name}"].status for name in ("signing_key", "key_pepper")] == ["fail", "fail"]
    assert found["secret organization_salt"].status == "warn"
    assert found["secrets folder"].status == "warn"
    (secrets_directory / "checkpoint_key").touch(0o644)
    assert find(secrets_of_host.examine)["secret checkpoint_key"].status == "fail"
    assert "0123" not in str(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_of_somebody_else(find: Find, secrets_directory: Path) -> None:
    """Its service could not read it."""
    path = secrets_directory / "master_key"
    path.chmod(0o600)
    os.chown(path, 12345, -1)
    assert find(secrets_of_host.examine)["secret master_key"].status == "warn"


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_secrets_of_another_host(client: FlaskClient, find: Find, secrets_directory: Path) -> None:
    """What a gateway with other keys stored and queued shows that they differ."""
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    found = find(secrets_of_host.examine)
    assert (found["master key fits"].status, found["signing key fits"].status) == ("ok", "ok")
    for name, check in (("signing_key", "signing key fits"), ("master_key", "master key fits")):
        (secrets_directory / name).write_text(secrets.token_hex(KEY_BYTES), encoding="ascii")
        assert find(secrets_of_host.examine)[check].status == "fail"


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_processes(configured: None, find: Find, redis_url: str) -> None:
    """Workers that serve another model, that are not ready, and messages that were set aside are told."""
    keys = QueueKeys("metaqore:")
    name = settings().engine.model_name
    with redis.Redis.from_url(redis_url) as client:
        assert find(processes.examine)["housekeeper"].status == "warn"
        for model_name, state, status in ((name, "ready", "ok"), (name, "loading", "warn"), ("other", "ready", "fail")):
            beat = {"worker": "gpu@one", "state": state, "model": model_name, "running": "0"}
            client.sadd(keys.workers, "gpu@one")
            client.set(keys.heartbeat("gpu@one"), json.dumps(beat))
            assert find(processes.examine)["workers"].status == status
        client.lpush(keys.named("refused"), "x")
        client.set("metaqore:housekeeper", "somebody")
        found = find(processes.examine)
    assert (found["refused messages"].status, found["housekeeper"].status) == ("warn", "ok")


def test_open_files_and_nothing_is_made(tmp_path: Path) -> None:
    """The limit of the process that asks, set by the shell that starts it."""
    limited = ["sh", "-c", f"ulimit -n 256; exec {sys.executable} -m flask doctor --json"]
    done = subprocess.run(
        limited, cwd=ROOT, env={**os.environ, "FLASK_SKIP_DOTENV": "1", "DATABASE_URL": f"sqlite:///{tmp_path}/x.db"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert (found["open files"]["status"], "256" in found["open files"]["says"]) == ("warn", True)
    assert "LimitNOFILE" in found["open files"]["remedy"]
    assert list(tmp_path.iterdir()) == [], "looking made something"


def test_packages_that_do_not_fit(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing ones and wrong versions are named."""
    needed = ["celery>=99", "no-such-package>=1", "pytest>=1; extra == 'dev'"]
    monkeypatch.setattr("gateway_app.doctor.host.importlib.metadata.requires", lambda _name: needed)
    finding = find(host.examine)["packages"]
    assert finding.status == "fail"
    assert "celery" in finding.says
    assert "no-such-package is missing" in finding.says


def test_where_it_listens(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is for containers; without a proxy it is told."""
    assert find(host.examine)["listening"].status == "warn"
    monkeypatch.setenv(f"{PREFIX}GATEWAY__HOST", "127.0.0.1")
    assert find(host.examine)["listening"].status == "ok"


def test_models_and_profiles(find: Find, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    """One that loads, and one that has a broken tokenizer; a profile that is none."""
    monkeypatch.setenv(f"{PREFIX}ENGINE__MODEL", str(tiny_model))
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(ROOT / "profiles"))
    assert {finding.status for finding in find(model.examine).values()} == {"ok"}
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    (tmp_path / "agent.yaml").write_text("nonsense: [", "utf-8")
    monkeypatch.setenv(f"{PREFIX}ENGINE__MODEL", str(tmp_path))
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(tmp_path))
    assert {finding.status for finding in find(model.examine).values()} == {"fail"}


@pytest.mark.parametrize(("key", "status"), [("right", "ok"), ("wrong", "fail")])
def test_metaqore(find: Find, monkeypatch: pytest.MonkeyPatch, secrets_directory: Path, key: str, status: str) -> None:
    """It is asked as a gateway asks it, with the key."""
    with closing(StandIn()) as server:
        server.api_key = "right"
        monkeypatch.setenv("METAQORE_URL", server.url)
        (secrets_directory / "metaqore_api_key").write_text(key, "ascii")
        assert find(metaqore.examine)["metaqore"].status == status
