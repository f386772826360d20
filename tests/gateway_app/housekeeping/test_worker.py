"""The housekeeper as a Celery worker: its name, its one task, and how it ends where it cannot begin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from celery.signals import celeryd_init

from gateway_app.housekeeping.mark import Mark
from gateway_app.housekeeping.worker import EXIT_CONFIGURATION, HousekeeperStep, sweep
from tasks.settings import PREFIX, settings

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


@SQLITE
@pytest.mark.usefixtures("configured")
def test_the_task_has_everything_looked_at(redis_url: str) -> None:
    """The leader's next round finds no mark, whichever housekeeper the task came to."""
    with redis.Redis.from_url(redis_url) as client:
        mark = Mark(client, settings().gateway.key_prefix)
        mark.begin()
        mark.finish()
        assert mark.whole()
        sweep()
        assert not mark.whole()


@pytest.mark.parametrize(
    ("given", "named"),
    [("celery@host", "housekeeping@host"), ("mine@host", "mine@host"), ("celery2@host", "celery2@host")],
)
def test_its_name(given: str, named: str) -> None:
    """It leaves Celery's usual name to the GPU worker of the same host, and keeps what an operator chose."""
    worker = SimpleNamespace(hostname=given)
    celeryd_init.send(sender=given, instance=worker, conf=None, options={})
    assert worker.hostname == named


def test_without_secrets_it_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says what is missing and what makes it, with the status that tells a supervisor not to try again."""
    monkeypatch.setenv(f"{PREFIX}SECRETS__DIRECTORY", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'gateway.db'}")
    settings.cache_clear()
    step = HousekeeperStep(SimpleNamespace())
    with pytest.raises(SystemExit) as ended:
        step.start(None)
    step.stop(None)
    assert ended.value.code == EXIT_CONFIGURATION
    assert "flask secrets create" in caplog.text
