"""The real engine: what it is worth that requests run where their profile is cached.

Two workers on a small model (SmolLM2-135M, on the CPU, a core each), and profiles of which one worker's KV cache holds a
part and both together hold all. The same clients ask the same under each strategy, each time on new workers:

    fifo                     whichever waits longest, wherever there is room
    cache_aware_continuous   what is best run there
    the same with RAM        and a tier of host memory behind each cache, if `--ram-gib` says so

    hits   prompt tokens found cached, as a share of what would be if each profile were computed once
    ttft   time to the first token, in seconds

The machine is shared by two engines and everything else: look at the ratios.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from bench.chaoslab.lab import quantile
from bench.chaoslab.site import Plan, Site
from bench.enginelab import cores
from bench.enginelab.checkpoint import endless, model_folder
from bench.enginelab.prompts import Ask, Prompts
from bench.enginelab.through import START_S, play_over_http
from bench.overheadlab.comparing import say
from bench.report import arguments, finish
from worker_gpu.engines.vllm_settings import CPU_BLOCK_TOKENS

FIFO, AWARE, TIERED = "fifo", "cache_aware_continuous", "cache_aware_continuous with RAM"
WORKERS = 2
#: Of Zipf's law, after which profiles are drawn.
EXPONENT = 0.9
QUESTION_TOKENS = 32
#: Blocks of a worker beside those of profiles: for questions and answers of what runs.
OWN_BLOCKS = 16
MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True)
class Seen:
    """What a strategy showed: seconds to each first token, prompt tokens that were cached, tokens a second of all answers."""

    first_s: Sequence[float]
    cached: int
    tokens_per_s: float


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    add = parser.add_argument
    add("--profiles", type=int, default=8, help="default: %(default)s")
    add("--profile-tokens", type=int, default=600, help="default: %(default)s")
    add("--held", type=int, default=5, help="profiles that one worker's cache holds; default: %(default)s")
    add("--requests", type=int, default=80, help="default: %(default)s")
    add("--clients", type=int, default=4, help="default: %(default)s")
    add("--answer-tokens", type=int, default=16, help="default: %(default)s")
    add("--ram-gib", type=float, default=0.0, help="of each worker's tier of host memory; default: none")
    options = parser.parse_args()
    # So that everything is stopped, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as made:
        figures = compare(options, Path(made))
    finish("cache", options, figures, {"ttft_p50 part of fifo": ("<=", 1.0), "hits more than fifo": (">=", 0.0)})


def compare(options: Namespace, folder: Path) -> dict[str, float]:
    """Have each strategy serve the same requests; return all figures."""
    model = endless(model_folder(None), folder / "model")
    profiles = folder / "profiles"
    profiles.mkdir()
    prompts = Prompts(model, profiles, options.seed)
    agents = [prompts.agent(f"agent-{number}", options.profile_tokens) for number in range(options.profiles)]
    weights = [rank**-EXPONENT for rank in range(1, len(agents) + 1)]
    drawn = random.Random(options.seed).choices(agents, weights, k=options.requests)
    asks = [ask for agent in drawn for ask in prompts.asks(agent, 1, QUESTION_TOKENS)]
    clients = [asks[client :: options.clients] for client in range(options.clients)]
    static_tokens = prompts.static_tokens(agents[0]) // CPU_BLOCK_TOKENS * CPU_BLOCK_TOKENS
    bound = (len(asks) - len({ask.agent for ask in asks})) * static_tokens
    seen: dict[str, Seen] = {}
    for strategy in (FIFO, AWARE, *([TIERED] if options.ram_gib else [])):
        say(f"{strategy}: starting {WORKERS} workers")
        seen[strategy] = serve(strategy, options, folder, model, clients)
        say(
            f"{strategy}: hits {seen[strategy].cached / bound:.3f}, ttft p50 {quantile(seen[strategy].first_s, 0.5):.2f} s"
        )
    figures: dict[str, float] = {}
    for strategy, one in seen.items():
        figures |= {f"{strategy} ttft_p{share}": quantile(one.first_s, share / 100) for share in (50, 90, 99)}
        figures |= {
            f"{strategy} ttft_mean": statistics.mean(one.first_s),
            f"{strategy} hits": one.cached / bound,
            f"{strategy} tokens_per_s": one.tokens_per_s,
        }
    figures["hits more than fifo"] = figures[f"{AWARE} hits"] - figures[f"{FIFO} hits"]
    for name in ("ttft_p50", "ttft_p90", "ttft_mean"):
        figures[f"{name} part of fifo"] = figures[f"{AWARE} {name}"] / figures[f"{FIFO} {name}"]
    return figures


def serve(strategy: str, options: Namespace, folder: Path, model: Path, clients: Sequence[Sequence[Ask]]) -> Seen:
    """Start a gateway with two new workers, and have all questions answered."""
    own = folder / strategy.replace(" ", "-")
    own.mkdir()
    tokens = options.profile_tokens // CPU_BLOCK_TOKENS + 1
    engine = {"num_gpu_blocks_override": options.held * tokens + OWN_BLOCKS}
    settings = {
        "ENGINE__KIND": "vllm",
        "ENGINE__MAX_MODEL_LEN": str(MAX_MODEL_LEN),
        "ENGINE__KV_CACHE_GIB": "1",
        "ENGINE__OPTIONS": json.dumps(engine),
        "GOVERNANCE__PROFILES_DIRECTORY": str(folder / "profiles"),
        "SCHEDULING__STRATEGY": AWARE if strategy == TIERED else strategy,
    }
    if strategy == TIERED:
        settings["CACHING__TIERS"] = json.dumps({"ram_gib": options.ram_gib})
    available = sorted(os.sched_getaffinity(0))
    plan = Plan(
        workers=WORKERS,
        lease_s=60.0,
        slots=max(2, options.clients // WORKERS),
        settings=settings,
        variables=[cores.engine_variables(available[number % len(available)]) for number in range(WORKERS)],
        start_s=START_S,
    )
    with Site(own, model, plan, say=lambda _text: None) as site:
        played = asyncio.run(play_over_http(site.urls[0], site.key, clients, options.answer_tokens))
        first_s = [answer.first_at - answer.asked_at for answer in played.answers]
        return Seen(first_s, cached_tokens(site.database_url), played.tokens_per_s)


def cached_tokens(database_url: str) -> int:
    """Return how many prompt tokens were found in the cache, as the record has it."""
    engine = sa.create_engine(database_url)
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT SUM(cached_tokens) FROM audit_requests")).scalar_one()
    engine.dispose()
    return int(found)


if __name__ == "__main__":
    main()
