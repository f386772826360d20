"""Flower as it is started here: for this machine only, behind a password, and with the queue's true length."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis
import requests

from tasks.queueing.keys import QueueKeys
from tasks.queueing.scripts import Scripts
from tests.services import free_port, wait_until
from tests.workers import ROOT

SOON_S = 60.0
BARE, NAMED = ("celery",), ("celery", "-A", "worker_gpu")


@contextmanager
def flower(log: Path, start: tuple[str, ...], **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Return a Flower that answers, however, and its URL."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *start, "flower", f"--port={port}"],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env=os.environ | variables,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status(url) or process.poll() is not None, SOON_S, "Flower to answer")
        yield process, url
    finally:
        process.kill()
        process.wait()


def status(url: str, password: str | None = None) -> int | None:
    """Return with which status the first page is answered, or None if nobody answers."""
    try:
        auth = None if password is None else ("flower", password)
        return requests.get(url, auth=auth, timeout=SOON_S).status_code
    except requests.ConnectionError:
        return None


@pytest.mark.parametrize("start", [BARE, NAMED])
def test_it_asks_for_the_password(
    start: tuple[str, ...], redis_url: str, secrets_directory: Path, tmp_path: Path
) -> None:
    """That `flask secrets create` made; on this machine only, and about everything that it shows."""
    (secrets_directory / "flower_password").write_text("a-password\n", "ascii")
    with flower(tmp_path / "log", start, REDIS_URL=redis_url) as (process, url):
        assert (status(url), status(url, "another"), status(url, "a-password")) == (401, 401, 200)
        for path in ("/tasks", "/broker", "/api/tasks", "/api/workers"):
            assert status(url + path) == 401
        assert {
            one.laddr.ip for one in psutil.Process(process.pid).net_connections() if one.status == psutil.CONN_LISTEN
        } == {"127.0.0.1"}
        with redis.Redis.from_url(redis_url) as client:
            put = Scripts(client, QueueKeys("metaqore:"))
            for number in range(3):
                put.run("put", f"profile{number}", f"tag{number}", "default", 5, 0, "{}")
        page = requests.get(f"{url}/broker", auth=("flower", "a-password"), timeout=SOON_S).text
        (row,) = re.findall(r'<tr id="gpu">.*?</tr>', page, re.DOTALL)
        assert re.findall(r">(\d+)<", row)[0] == "3"


def test_its_own_variable_goes_first(redis_url: str, secrets_directory: Path, tmp_path: Path) -> None:
    """Another password, and no file."""
    with flower(tmp_path / "log", NAMED, REDIS_URL=redis_url, FLOWER_BASIC_AUTH="flower:of-the-operator") as (_, url):
        assert (status(url), status(url, "of-the-operator")) == (401, 200)


def test_it_is_never_open(redis_url: str, tmp_path: Path) -> None:
    """Without any password it does not start, and says what would help."""
    with flower(tmp_path / "log", BARE, REDIS_URL=redis_url) as (process, url):
        assert process.wait(SOON_S) == 1
        assert status(url) is None
    said = (tmp_path / "log").read_text()
    assert "flower_password does not exist" in said
    assert "flask secrets create" in said


@pytest.mark.parametrize(("setting", "shown"), [("false", "False"), ("true", "True")])
def test_it_switches_events_on_only_where_they_are_wanted(setting: str, shown: str, redis_url: str) -> None:
    """By itself it would have every worker send them, once it has been started, for ever."""
    code = "import sys; sys.argv = ['celery', 'flower']; import flower.command, tasks.app; tasks.app.configuration()"
    code += "; from tornado.options import options; print(options.enable_events, options.address)"
    environment = os.environ | {"REDIS_URL": redis_url, "METAQORE_FLOWER__EVENTS": setting}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SOON_S,
        check=True,
    )
    assert ran.stdout.split() == [shown, "127.0.0.1"]
