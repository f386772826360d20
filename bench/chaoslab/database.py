"""The database is away for a minute under load.

PostgreSQL is stopped, and started again later, by nobody else's doing. Meanwhile nothing may be accepted, since nothing
can be recorded: clients are told 503, and ask again. What was accepted before is kept, answers that are complete wait to
be recorded, and when the database is back everything goes on by itself.
"""

from __future__ import annotations

import random
import time

from bench.chaoslab import recovery
from bench.chaoslab.calm import again_and_again, ask_calmly, questions
from bench.chaoslab.clients import Crowd
from bench.chaoslab.judge import judge
from bench.chaoslab.lab import Lab, Outcome
from bench.chaoslab.record import read
from bench.chaoslab.site import Plan, Site

AWAY_S = 60.0
#: How long a gateway waits for the database before it says 503.
PATIENCE_S = 1.0
PLAN = Plan(
    gateways=1,
    workers=2,
    database="postgresql",
    engine={"tokens_per_s_per_sequence": 30.0},
    settings={"DATABASE__TIMEOUT_S": str(PATIENCE_S)},
)
TOKENS = (10, 60)
CALM_S = 1.0
A_SECOND = 4.0
END_S = 300.0


def run(lab: Lab) -> Outcome:
    """Run it."""
    rng = lab.rng("database")
    away_s = lab.seconds(AWAY_S, least=3 * PATIENCE_S)
    with Site(lab.folder, lab.model, PLAN, lab.say) as site:
        assert site.postgres is not None  # noqa: S101  the plan says so
        calm = ask_calmly(site, questions(rng, 24, TOKENS), lab.seed)
        asked = again_and_again(random.Random(lab.seed), list(calm))
        with Crowd(site.urls, site.key, asked, seed=lab.seed, at_once=24) as crowd:
            site.progress = crowd.progress
            site.wait(CALM_S + rng.uniform(0.0, 1.0))
            site.postgres.stop()
            went, finished_before = time.time(), crowd.finished
            # Those of the crowd wait for their answers. Others come now, and take a refusal for an answer.
            newcomers = Crowd(site.urls, site.key, again_and_again(rng, list(calm)), seed=lab.seed, per_second=A_SECOND)
            with newcomers:
                site.wait(away_s)
                returns = time.time()
                newcomers.enough()
                site.see_out(newcomers)
            site.postgres.start()
            returned = time.time()
            again = site.until(
                lambda: [told.accepted_at for told in [*crowd.told] if told.accepted_at > returns], END_S, "a new 202"
            )
            site.until(lambda: crowd.finished > finished_before + 24, END_S, "answers again")
            answers_again = time.time()
            crowd.enough()
            site.see_out(crowd)
        record = read(site.database_url)
    everybody = [*crowd.told, *newcomers.told]
    verdict = judge(record, everybody, calm)
    refusals = [status for told in everybody for status, _ in told.refusals]
    figures = {
        "requests": float(len(record.rows)),
        "away_s": away_s,
        "accepted_while_away": float(sum(went < told.accepted_at < returns for told in everybody)),
        "refused_with_503": float(refusals.count(503)),
        "refused_otherwise": float(len(refusals) - refusals.count(503)),
        "accepts_again_s": min(again) - returned,
        "answers_again_s": answers_again - returned,
        "run_again_share": recovery.run_again(record),
        **verdict.broken,
    }
    targets = {
        **verdict.targets(),
        "accepted_while_away": ("<=", 0.0),
        "refused_with_503": (">=", 1.0),
        "refused_otherwise": ("<=", 0.0),
    }
    return Outcome(figures, targets, verdict.examples)
