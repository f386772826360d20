"""This gateway as a system: Redis, one gunicorn process, one worker, one housekeeper, SQLite or PostgreSQL.

Everything is on that is on by default: governance and detection, audit, encryption, queue, access log, metrics. The engine
is the simulated one, without times; it is part of the worker's process, and so of what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import sqlalchemy as sa
import yaml

from bench.chaoslab.site import Plan, Site
from bench.overheadlab.system import System
from tests.services import PostgresServer
from tests.tiny_model import make_tiny_model, train_tokenizer
from tests.workers import ROOT

Database = Literal["sqlite", "postgresql"]
AGENT = "bench-agent"
MODEL = "bench-model"
#: More than clients ask at once, so that nothing waits for room.
SLOTS = 128
VOCABULARY = 8_192


class DurablePostgres(PostgresServer):
    """PostgreSQL as a deployment runs it: what is committed is on the disk, and it cleans up after itself."""

    def command(self) -> list[str]:
        """Return the command that runs it."""
        options = {"fsync": "on", "full_page_writes": "on", "autovacuum": "on", "shared_buffers": "256MB"}
        return [*super().command(), *(word for key, value in options.items() for word in ("-c", f"{key}={value}"))]


def make_model(folder: Path) -> Path:
    """Make a checkpoint whose tokenizer has as many words as are needed to split English into three letters a token."""
    make_tiny_model(folder)
    pages = sorted((ROOT / "docs").rglob("*.md"))
    tokenizer = train_tokenizer((page.read_text("utf-8") for page in pages), VOCABULARY)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class OurSite:
    """One installation, with the systems that it is asked as. `parts` are its processes."""

    def __init__(self, site: Site) -> None:
        self.site = site
        pids = {
            "gateway": [process.pid for process in site.gateways],
            "redis": [site.redis.pid],
            "worker": [process.pid for process in site.workers],
            "housekeeper": [process.pid for process in site.housekeepers],
            "postgresql": [] if site.postgres is None else [site.postgres.pid],
        }
        self.parts = {part: [psutil.Process(pid) for pid in found] for part, found in pids.items() if found}

    def system(self, name: str, inline_prompt: str = "") -> System:
        """Return it as a system: asked for the agent whose profile has the prompt, or with the prompt in each request."""
        port = int(self.site.urls[0].rsplit(":", 1)[1])
        headers = {"Authorization": f"Bearer {self.site.key}"}
        return System(name, port, MODEL if inline_prompt else AGENT, self.parts, headers, inline_prompt)

    def check(self, answered: int) -> None:
        """Raise RuntimeError unless every process still runs and the record has as many answers, and no other end."""
        if ended := [process.name for process in self.site.processes if process.ended]:
            raise RuntimeError(f"{', '.join(ended)} ended; logs are in {self.site.folder}")
        engine = sa.create_engine(self.site.database_url)
        with engine.connect() as connection:
            ends = sa.text("SELECT outcome, COUNT(*) FROM audit_requests GROUP BY outcome")
            found = {str(outcome): int(number) for outcome, number in connection.execute(ends)}
        engine.dispose()
        if found != {"completed": answered}:
            raise RuntimeError(f"{answered} requests were answered, and the record has {found}")


@contextmanager
def our_site(
    folder: Path, model: Path, prompt: str, database: Database = "sqlite", gap_s: float = 0.0, **settings: str
) -> Iterator[OurSite]:
    """Start an installation in a new folder. `gap_s` is the time between the words of an answer.

    `settings` are further ones, named as variables without the prefix.
    """
    profiles = folder / "profiles"
    profiles.mkdir(parents=True)
    profile = {
        "agent": AGENT,
        "version": 1,
        "description": "What the benchmark asks.",
        "segments": [{"kind": "role", "text": prompt}],
    }
    (profiles / f"{AGENT}.yaml").write_text(yaml.safe_dump(profile), "utf-8")
    pace: dict[str, Any] = {"tokens_per_s_per_sequence": 1 / gap_s} if gap_s else {"time_scale": 0}
    plan = Plan(
        # A stable one: renewals of leases that are cut short belong to no request.
        lease_s=60.0,
        slots=SLOTS,
        engine={**pace, "max_num_seqs": SLOTS},
        settings={
            "GOVERNANCE__PROFILES_DIRECTORY": str(profiles),
            "ENGINE__SERVED_MODEL_NAME": MODEL,
            "STREAMING__JOIN_MS": "15",
            **settings,
        },
    )
    site = Site(folder, model, plan, say=lambda _text: None)
    if database == "postgresql":
        site.postgres = DurablePostgres()
    with site:
        yield OurSite(site)
