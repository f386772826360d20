"""The Compose file: true to itself, to its example of variables, to the images and to the settings."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest

from tests.deploy.manifests import DEPLOY, SPARE_S, documents, seconds, settings_of

TEXT = (DEPLOY / "compose.yaml").read_text("utf-8")
(COMPOSE,) = documents(DEPLOY / "compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name in SERVICES if name not in ("redis", "postgres")]
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?::[-?]([^}]*))?\}")
FILLED_IN = dict(re.findall(r"^([A-Z_]+)=(.*)$", (DEPLOY / ".env.example").read_text("utf-8"), re.MULTILINE))
#: Variables that have a default good enough to be left out of the example.
OPTIONAL = {"METAQORE_TAG", "REDIS_MAXMEMORY"}


def interpolated(text: str) -> str:
    """Return what Compose makes of a value, with passwords filled in."""
    return VARIABLE.sub(lambda match: FILLED_IN.get(match[1]) or "filled-in", text)


def test_every_variable_is_in_the_example() -> None:
    """Whoever fills in the example has all; passwords in it are empty, so that nobody keeps them."""
    used = {match[1] for match in VARIABLE.finditer(TEXT)}
    assert used <= FILLED_IN.keys() | OPTIONAL
    assert FILLED_IN.keys() <= used | {"COMPOSE_PROFILES"}
    assert not any(value for name, value in FILLED_IN.items() if "PASSWORD" in name)


@pytest.mark.parametrize("name", OURS)
def test_settings_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and values that the settings accept."""
    settings = settings_of(
        {key: interpolated(value) for key, value in SERVICES[name]["environment"].items()}, monkeypatch
    )
    assert settings.gateway.request_queue_url == "redis://:filled-in@redis:6379/0"
    if name == "worker-simulated":
        assert settings.engine.kind == "simulated"


@pytest.mark.parametrize("name", SERVICES)
def test_what_it_names_is_there(name: str) -> None:
    """Other services, volumes, Dockerfiles, profiles that the example can ask for."""
    service = SERVICES[name]
    assert service.get("depends_on", {}).keys() <= SERVICES.keys()
    for volume in service.get("volumes", ()):
        source = volume.partition(":")[0]
        assert source in COMPOSE["volumes"] or source.startswith("${MODELS_DIRECTORY")
    if "build" in service:
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    assert set(service.get("profiles", ())) <= {"gpu", "simulated", "flower"}


@pytest.mark.parametrize("name", OURS)
def test_containers_are_restricted(name: str) -> None:
    """They write nowhere but where they must, and become nobody else."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_ports_are_opened_on_loopback_only() -> None:
    """A published port of Docker's passes by the host's firewall."""
    published = [interpolated(port) for service in SERVICES.values() for port in service.get("ports", ())]
    assert sorted(published) == ["127.0.0.1:5555:5555", "127.0.0.1:8080:8080"]


def test_grace_periods_outlast_the_processes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is killed that is still ending in order."""
    grace_s = {name: seconds(SERVICES[name]["stop_grace_period"]) for name in SERVICES if name != "release"}
    settings = settings_of({}, monkeypatch)
    assert grace_s["gateway"] >= import_module("gateway_app.gunicorn").graceful_timeout + SPARE_S
    assert grace_s["worker"] == grace_s["worker-simulated"] >= settings.scheduling.drain_s + 2 * SPARE_S
    assert grace_s["housekeeping"] >= 2 * SPARE_S


def test_health_is_asked_for_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the metrics' ports; what these answer has tests of its own."""
    settings = settings_of({}, monkeypatch)
    ports = {"worker": settings.metrics.worker_port, "housekeeping": settings.metrics.housekeeper_port}
    for name, port in ports.items():
        assert f"http://127.0.0.1:{port}/healthz" in SERVICES[name]["healthcheck"]["test"][-1]


def test_redis_keeps_what_waits() -> None:
    """It refuses writes rather than evict, logs them to disk, and wants a password."""
    command = SERVICES["redis"]["command"]
    for option in ("--maxmemory-policy noeviction", "--appendonly yes", '--requirepass "$$REDIS_PASSWORD"'):
        assert option in command
    assert "redis:/data" in SERVICES["redis"]["volumes"]
