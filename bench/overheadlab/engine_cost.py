"""What the simulated engine itself costs a request: it is part of our worker, and stands where others have a model elsewhere."""

from __future__ import annotations

import asyncio
import random
import time

from bench.overheadlab.system import ANSWER_TOKENS
from tasks.job import Sampling
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.engines.simulated_options import SimulationOptions

#: Of prompts that are alike but for their last tokens, as those of one agent are.
PROMPT_TOKENS, OWN_TOKENS = 1_000, 40
REQUESTS, AT_ONCE = 400, 16


def engine_ms(seed: int) -> float:
    """Return the processor time of the engine alone, in milliseconds a request."""
    return asyncio.run(_measured(random.Random(seed)))


async def _measured(chance: random.Random) -> float:
    engine = SimulatedEngine("bench", SimulationOptions(time_scale=0, answer_tokens=ANSWER_TOKENS))
    await engine.start()
    shared = [chance.randrange(8_000) for _ in range(PROMPT_TOKENS)]
    prompts = [[*shared, *(chance.randrange(8_000) for _ in range(OWN_TOKENS))] for _ in range(REQUESTS)]
    waiting = iter(enumerate(prompts))

    async def client() -> None:
        for number, prompt in waiting:
            request = GenerationRequest(str(number), prompt, Sampling(max_tokens=ANSWER_TOKENS, seed=number), "salt")
            async for _ in engine.generate(request):
                pass

    began = time.process_time()
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    used_s = time.process_time() - began
    await engine.stop()
    return used_s * 1000 / REQUESTS
