"""The whole gateway in front of the same engines: Redis, one gateway, a process a worker, one housekeeper, SQLite.

Everything is on that is on by default. Its own times are stretched as the engines' are: leases, what is joined to a frame, how
often a worker reports.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import sqlalchemy as sa

from bench.chaoslab.site import Plan, Site
from bench.enginelab.prompts import write_agent
from bench.overheadlab.system import System
from bench.schedulinglab.http_client import Target
from bench.schedulinglab.http_engine import MODEL
from bench.schedulinglab.http_work import SCALE_VARIABLE, Texts, agent
from bench.schedulinglab.workload import Profile
from tasks.prompts.layout import PromptLayout
from tasks.prompts.tokenizer import ModelTokenizer
from tasks.settings import SchedulingGroup, StreamingGroup
from worker_gpu.engines.simulated_options import SimulationOptions

WORKER_APP = "bench.schedulinglab.http_worker"


class OurFleet:
    """A gateway that runs, as a target; it remembers which worker answered what."""

    def __init__(self, site: Site, static_tokens: int) -> None:
        self._site = site
        parts = {
            "gateway": site.gateways,
            "worker": site.workers,
            "housekeeper": site.housekeepers,
        }
        processes = {part: [psutil.Process(one.pid) for one in found] for part, found in parts.items()}
        system = System(
            "ours",
            int(site.urls[0].rsplit(":", 1)[1]),
            MODEL,
            {**processes, "redis": [psutil.Process(site.redis.pid)]},
            {"Authorization": f"Bearer {site.key}"},
        )
        self.target = Target(system, by_agent=True, static_tokens=static_tokens)

    def workers(self) -> dict[str, str]:
        """Return which worker answered each request, by their ids."""
        engine = sa.create_engine(self._site.database_url)
        with engine.connect() as connection:
            rows = connection.execute(sa.text("SELECT request_id, worker FROM audit_requests"))
            found = {str(request_id): str(worker) for request_id, worker in rows}
        engine.dispose()
        return found


@contextmanager
def our_fleet(
    folder: Path,
    model: Path,
    profiles: Sequence[Profile],
    texts: Texts,
    workers: int,
    options: SimulationOptions,
    settings: Mapping[str, str],
) -> Iterator[OurFleet]:
    """Start a gateway with so many workers in a new folder. `settings` are further ones, without the prefix."""
    written = folder / "profiles"
    written.mkdir(parents=True)
    for profile in profiles:
        write_agent(written, agent(profile), texts.profile(profile))
    layout = PromptLayout(ModelTokenizer(model), texts.profile(profiles[0]))
    scale, streaming = options.time_scale, StreamingGroup()
    plan = Plan(
        workers=workers,
        lease_s=SchedulingGroup().lease_s * scale,
        slots=options.max_num_seqs,
        engine=json.loads(options.model_dump_json(exclude_unset=True)),
        settings={
            "GOVERNANCE__PROFILES_DIRECTORY": str(written),
            "ENGINE__SERVED_MODEL_NAME": MODEL,
            "STREAMING__JOIN_MS": str(min(1000.0, streaming.join_ms * scale)),
            "STREAMING__JOIN_MAX_MS": str(min(5000.0, streaming.join_max_ms * scale)),
            **settings,
        },
        worker_app=["-A", WORKER_APP],
        variables=[{SCALE_VARIABLE: str(scale)}] * workers,
    )
    with Site(folder, model, plan, say=lambda _text: None) as site:
        yield OurFleet(site, len(layout.static_token_ids))
