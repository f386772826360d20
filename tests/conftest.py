"""Fixtures for all tests: settings of their own, and real services.

A service is started once per test process, so once per worker under pytest-xdist, and every test gets it empty.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from xdist.scheduler import LoadFileScheduling

from gateway_app import build
from gateway_app.governance.api_keys import ApiKeys, Role
from tasks.db import Database
from tasks.migrating import upgrade
from tasks.settings import CONFIG_VARIABLE, KEY_BYTES, PREFIX, SECRET_NAMES, settings
from tests.conforming import watched
from tests.measuring import unmeasured_children
from tests.services import PostgresServer, RedisServer, require
from tests.tiny_model import make_tiny_model
from tests.tokenised_once import tokenised_once

ROOT = Path(__file__).parents[1]
#: Where vLLM's engine runs. Two at once would take each other's processors, and many times as long.
RUN_VLLM = (
    "tests/test_real_engine.py",
    "tests/worker_gpu/engines/test_orphans.py",
    "tests/worker_gpu/engines/test_vllm",
)
#: The files that take longest, besides. xdist by itself begins with those that have the most tests, and these have few:
#: left for the end, one of them would run alone while the other processes have nothing to do.
LONG = (
    "tests/upgrade/test_rolling_upgrade.py",
    "tests/chaos/test_chaos.py",
    "tests/gateway_app/test_rolling_restart.py",
    "tests/gateway_app/batches/test_driving.py",
    "tests/gateway_app/test_schemathesis.py",
    "tests/gateway_app/api/test_outages",
    "tests/gateway_app/test_cancelling.py",
    "tests/gateway_app/test_synchronous.py",
)
#: Where vLLM is only served or asked. To measure its own processes too makes them half as slow again, and finds nothing:
#: what of ours they run is tested beside it, where it is measured.
#:
#: And where gateways and workers are killed in the end, which loses what was measured, or do the same as those of a file
#: that is not named here: a gateway that is measured takes twice as long to start.
UNMEASURED = (
    "tests/gateway_app/batches/test_driver.py",
    "tests/gateway_app/kv_cache/test_isolation.py",
    "tests/gateway_app/openai/test_chat_client.py",
    "tests/gateway_app/profiles/test_shared_base.py",
    "tests/gateway_app/responses/test_responses_answers.py",
    "tests/gateway_app/test_gunicorn_stop.py",
    "tests/gateway_app/test_openapi.py",
    "tests/gateway_app/test_rolling_restart.py",
    "tests/gateway_app/test_synchronous.py",
    "tests/privacy/test_no_canary.py",
    "tests/test_journey.py",
    "tests/test_real_engine.py",
    "tests/tracing/test_off.py",
    "tests/worker_gpu/engines/test_vllm.py",
)


class Schedule(LoadFileScheduling):  # type: ignore[misc]
    """Gives each process whole files, and to one of them all that run vLLM, in the order of the collection."""

    def _split_scope(self, nodeid: str) -> str:
        return "vllm" if nodeid.startswith(RUN_VLLM) else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Schedule | None:
    """Share out the files to the processes of `pytest -n`."""
    config.option.loadscopereorder = False
    return Schedule(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: all that run vLLM, then the long files."""
    items.sort(key=lambda item: (not item.nodeid.startswith(RUN_VLLM), not item.nodeid.startswith(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs vLLM where it is not installed, or fail in CI."""
    if item.get_closest_marker("vllm"):
        require("vllm")


@pytest.fixture(autouse=True, scope="module")
def measured_children(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the processes that a module starts be measured by coverage, where that finds something."""
    with unmeasured_children() if request.node.nodeid.startswith(UNMEASURED) else nullcontext():
        yield


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes an empty folder with a name like this.

    pytest's own looks through all folders that there are for the next number, which takes longer with each test.
    """
    root, numbers = tmp_path_factory.mktemp("tests"), itertools.count()

    def make(name: str) -> Path:
        (folder := root / f"{name}{next(numbers)}").mkdir(mode=0o700)
        return folder

    return make


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, new_folder: Callable[[str], Path]) -> Path:
    """Return an empty folder of this test, in place of pytest's."""
    return new_folder(re.sub(r"\W", "_", request.node.name)[:30])


@pytest.fixture(autouse=True)
def secrets_directory(new_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test default settings and fresh secrets, whose folder is returned.

    The developer's own environment, gateway.json and var/ are out of reach.
    """
    for name in os.environ:
        if name.startswith((PREFIX, "OTEL_")) or name in ("REDIS_URL", "DATABASE_URL"):
            monkeypatch.delenv(name)
    folder = new_folder("settings")
    (folder / "gateway.json").write_text("{}", encoding="utf-8")
    directory = folder / "secrets"
    directory.mkdir(mode=0o700)
    for name in SECRET_NAMES:
        (directory / name).write_text(secrets.token_hex(KEY_BYTES) + "\n", encoding="ascii")
    monkeypatch.setenv(CONFIG_VARIABLE, str(folder / "gateway.json"))
    monkeypatch.setenv(f"{PREFIX}SECRETS__DIRECTORY", str(directory))
    settings.cache_clear()
    yield directory
    settings.cache_clear()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """Return the Redis that all tests of this process share. Do not stop it: that is what `own_redis` is for."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Return the URL of an empty Redis."""
    redis_server.empty()
    return redis_server.url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """Return a running Redis that belongs to this test, to be killed and started at will."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Return the PostgreSQL that all tests of this process share."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """Return the URL of an empty PostgreSQL database, deleted after the test."""
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return which kind of database the test runs on; it runs once for each."""
    kind: str = request.param
    return kind


@pytest.fixture
def database_url(request: pytest.FixtureRequest, database_kind: str, tmp_path: Path) -> str:
    """Return the URL of an empty database without tables."""
    if database_kind == "sqlite":
        return f"sqlite:///{tmp_path / 'gateway.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an SQLite database that has all tables and no rows, to be copied."""
    path = tmp_path_factory.mktemp("template") / "gateway.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest, database_kind: str, sqlite_template: Path, tmp_path: Path) -> str:
    """Return the URL of a database that has all tables and no rows. None is migrated anew, which would take minutes."""
    if database_kind == "sqlite":
        return f"sqlite:///{shutil.copy(sqlite_template, tmp_path)}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.migrated_url(upgrade)


@pytest.fixture(autouse=True, scope="session")
def shared_layouts() -> Iterator[None]:
    """Let the gateways of this process share what tokenising the shipped profiles gives."""
    with tokenised_once(ROOT / "profiles"):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny checkpoint with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def configured(redis_url: str, migrated_url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure this process, and those it starts, for a gateway on empty services, its database migrated."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", migrated_url)
    monkeypatch.setenv(f"{PREFIX}ENGINE__KIND", "simulated")
    monkeypatch.setenv(f"{PREFIX}ENGINE__MODEL", str(tiny_model))
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(ROOT / "profiles"))
    settings.cache_clear()


@pytest.fixture
def client(configured: None) -> Iterator[FlaskClient]:
    """Return a client of a gateway without workers, authenticated for the organization `default`.

    Every answer it gets must be as the OpenAPI document says.
    """
    faults: list[str] = []
    app = watched(build(settings()), faults)
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
    with app.extensions["closing"]:
        yield client
    assert not faults, faults


def new_key(organization: str, role: Role = "member") -> str:
    """Return an API key of `organization` for the configured gateway."""
    database = Database(settings().database)
    try:
        return ApiKeys(database, settings().secrets.keys("key_pepper")).create(organization, "test", role)[1]
    finally:
        database.close()
