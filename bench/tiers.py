r"""First-token times of long profiles by where their KV cache is: nowhere, on the GPU, in host RAM, on disk.

One engine with both tiers is loaded, as a worker has it (docs/tiers.md). Each profile is asked for twice, then the GPU's cache is
emptied, they are asked for again, then RAM's tier is emptied too. Before that the files are synchronised and the kernel is told
to forget them, so that they are read from the disk. Nothing else runs in the engine; a question adds a few tokens
that are always new.

    cold, cached, ram, disk    milliseconds to the first token, median over the profiles
    *_of_cold                  the same, as a share of cold
    *_tokens_per_s             what the engine measured, as workers report it

On a host with a GPU, with the shape of a model of 8 billion parameters and random weights:

    python -m bench.tiers --shape llama-8b --profile-tokens 8000 --max-model-len 16384 --ram-gib 16 --disk-gib 32 \
      --directory /mnt/nvme --engine-options '{"load_format": "dummy"}'
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from argparse import Namespace
from contextlib import aclosing
from pathlib import Path

from pydantic import SecretStr

from bench.enginelab.checkpoint import add_model_options, model_folder, shape_only
from bench.enginelab.prompts import Ask, Prompts
from bench.report import arguments, finish
from tasks.job import Sampling
from tasks.settings import (
    KEY_BYTES,
    CachingGroup,
    EngineGroup,
    SecretsGroup,
    Settings,
    TiersGroup,
)
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.vllm import VllmEngine

STATES = ("cold", "cached", "ram", "disk")
#: Less than this share of a profile found is another state than the one that is measured: the rest is a part of a block.
LEAST_FOUND = 0.9


def main() -> None:
    """Run it."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="tiers-", dir=options.directory) as made:
        figures = asyncio.run(_measure(options, Path(made)))
    finish(
        "tiers",
        options,
        figures,
        {"ram_of_cold": ("<=", options.ram_target), "disk_of_cold": ("<=", options.disk_target)},
    )


async def _measure(options: Namespace, folder: Path) -> dict[str, float]:
    checkpoint = _checkpoint(options, folder / "model")
    (folder / "profiles").mkdir()
    prompts = Prompts(checkpoint, folder / "profiles", options.seed)
    agents = [prompts.agent(f"long-{number}", options.profile_tokens) for number in range(options.profiles)]
    warm_up = prompts.agent("short", 100)
    bench = _Bench(VllmEngine(_settings(options, checkpoint, folder / "kv")))
    figures: dict[str, float] = {}
    await bench.engine.start()
    try:
        await bench.first_token_s(prompts.asks(warm_up, 1, 8)[0], 0.0)
        for state in STATES:
            await bench.empty(state, folder / "kv")
            least = 0.0 if state == "cold" else LEAST_FOUND
            asks = [prompts.asks(agent, 1, options.prompt_tokens)[0] for agent in agents]
            times = [await bench.first_token_s(ask, least) for ask in asks]
            await bench.idle()
            figures[f"{state}_ms"] = statistics.median(times) * 1000
            figures["prompt_tokens"] = float(len(asks[0].token_ids))
        rates = bench.engine.tier_rates
        figures |= {"ram_tokens_per_s": rates.ram, "disk_tokens_per_s": rates.disk}
    finally:
        await bench.engine.stop()
    return figures | {f"{state}_of_cold": figures[f"{state}_ms"] / figures["cold_ms"] for state in STATES[1:]}


class _Bench:
    """Asks an engine, and has it forget."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self._numbers = itertools.count()

    async def first_token_s(self, ask: Ask, least_found: float) -> float:
        """Return the seconds to the first token. Raises RuntimeError if less than this share of the prompt was found."""
        name = f"bench-{next(self._numbers)}"
        request = GenerationRequest(name, ask.token_ids, Sampling(max_tokens=1, seed=1), cache_salt="bench")
        asked_at = time.monotonic()
        async with aclosing(self.engine.generate(request)) as deltas:
            first = await anext(deltas)
            took_s = time.monotonic() - asked_at
            async for _ in deltas:
                pass
        if first.cached_tokens < least_found * len(ask.token_ids) or (not least_found and first.cached_tokens):
            raise RuntimeError(f"{first.cached_tokens} of {len(ask.token_ids)} tokens were found")
        return took_s

    async def idle(self) -> None:
        """Wait until everything is copied into the tiers."""
        llm = self.engine._llm  # noqa: SLF001  no worker wants to wait for that
        await llm.pause_generation(mode="wait", clear_cache=False)
        await llm.resume_generation()

    async def empty(self, state: str, files: Path) -> None:
        """Have everything forgotten that is above the tier to be measured."""
        if state not in ("ram", "disk"):
            return
        if not await self.engine._llm.reset_prefix_cache(reset_connector=state == "disk"):  # noqa: SLF001  as in `idle`
            raise RuntimeError("the engine does not forget")
        if state == "disk":
            await asyncio.to_thread(_forget, files)


def _forget(files: Path) -> None:
    """Have the kernel forget what it holds of the tier's files."""
    os.sync()
    for file in files.glob("*/*/*.kv"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _options() -> Namespace:
    parser = arguments(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--profiles", type=int, default=5, help="default: %(default)s")
    add("--profile-tokens", type=int, default=1500, help="default: %(default)s")
    add("--prompt-tokens", type=int, default=16, help="of a question; default: %(default)s")
    add("--max-model-len", type=int, help="default: the model's")
    add("--kv-cache-gib", type=float, default=1.0, help="without an accelerator; default: %(default)s")
    add("--ram-gib", type=float, default=1.0, help="default: %(default)s")
    add("--disk-gib", type=float, default=2.0, help="default: %(default)s")
    add("--directory", type=Path, help="a folder on the disk to be measured; default: the system's for temporary files")
    add("--engine-options", type=json.loads, default={}, metavar="JSON", help="further ones of vLLM")
    add("--ram-target", type=float, default=0.5, help="most of ram_of_cold; default: %(default)s")
    add("--disk-target", type=float, default=1.0, help="most of disk_of_cold; default: %(default)s")
    return parser.parse_args()


def _checkpoint(options: Namespace, folder: Path) -> Path:
    model = model_folder(options.model)
    return shape_only(options.shape, model, folder) if options.shape else model


def _settings(options: Namespace, checkpoint: Path, directory: Path) -> Settings:
    tiers = TiersGroup(ram_gib=options.ram_gib, disk_gib=options.disk_gib, disk_directory=directory)
    return Settings(
        engine=EngineGroup(
            model=str(checkpoint),
            max_num_seqs=4,
            max_model_len=options.max_model_len,
            kv_cache_gib=options.kv_cache_gib,
            options=options.engine_options,
        ),
        caching=CachingGroup(tiers=tiers),
        secrets=SecretsGroup(master_key=SecretStr(os.urandom(KEY_BYTES).hex())),
    )


if __name__ == "__main__":
    main()
