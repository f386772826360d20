"""vLLM's AsyncLLM alone, in a process of its own that holds nothing else: what the gateway is compared with.

It has the arguments that a worker gives it, and keeps no statistics, which a worker does: so it is at its fastest.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.enginelab.prompts import Ask
from bench.enginelab.rounds import Answered, Round, now, play
from tasks.job import Sampling
from tasks.settings import Settings

STOP_S = 60.0


class Direct:
    """The engine alone. It starts at once; `wait` returns when it is ready."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        """Start it with the engine's settings of a worker, and these variables besides."""
        self._pipe, theirs = multiprocessing.Pipe()
        # Not a child of multiprocessing: the engine's own children would import this program's main module again.
        command = (sys.executable, "-m", "bench.enginelab.direct", str(theirs.fileno()))
        variables = os.environ | environment
        self.process = subprocess.Popen(command, env=variables, pass_fds=[theirs.fileno()])  # noqa: S603
        theirs.close()
        self._pipe.send(settings)

    def wait(self) -> None:
        """Return when the model is loaded. Raises RuntimeError if it could not be; vLLM has told why by then."""
        try:
            self._pipe.recv()
        except EOFError:
            raise RuntimeError("the engine alone did not start") from None

    def play(self, clients: Sequence[Sequence[Ask]], answer_tokens: int) -> Round:
        """Have the questions answered, each with so many tokens."""
        self._pipe.send((clients, answer_tokens))
        answered: Round = self._pipe.recv()
        return answered

    def stop(self) -> None:
        """End it."""
        self._pipe.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> None:
    """Serve the program that started this one, over the pipe whose number it gives."""
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    asyncio.run(_serve(pipe, pipe.recv()))


async def _serve(pipe: Connection[Any, Any], settings: Settings) -> None:
    from worker_gpu.engines.vllm_settings import engine_arguments, set_cpu_environment, set_environment

    set_environment(settings)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = engine_arguments(settings, current_platform.is_cpu())
    if current_platform.is_cpu():
        set_cpu_environment(eager=bool(arguments.get("enforce_eager")))
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**{**arguments, "disable_log_stats": True}))
    try:
        await llm.get_supported_tasks()
        pipe.send("ready")
        while True:
            try:
                clients, answer_tokens = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            pipe.send(await _play(llm, clients, answer_tokens))
    finally:
        llm.shutdown()
        # Its destructor needs modules that are gone when the interpreter ends.
        del llm


async def _play(llm: Any, clients: Sequence[Sequence[Ask]], answer_tokens: int) -> Round:
    from worker_gpu.engines.vllm_sampling import sampling_params

    numbers = itertools.count()

    async def answer(ask: Ask) -> Answered:
        # As a worker has it, but for the salt's name: one organization's prefixes are found again.
        prompt = {"prompt_token_ids": ask.token_ids, "cache_salt": "direct"}
        number = next(numbers)
        params = sampling_params(Sampling(max_tokens=answer_tokens, seed=number))
        asked_at, first_at, tokens = now(), None, 0
        async for output in llm.generate(prompt, params, f"{asked_at}-{number}"):
            first_at = first_at or now()
            tokens += len(output.outputs[0].token_ids)
        return Answered(asked_at, first_at or now(), now(), tokens)

    return await play(clients, answer)


if __name__ == "__main__":
    main()
