"""What the real engine is started with: vLLM's arguments, and what it reads from the environment only."""

from __future__ import annotations

import os
import platform
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from tasks.logs import get_logger
from tasks.settings import Settings
from worker_gpu.engines import vllm_hashes, vllm_logs
from worker_gpu.engines.vllm_tiers import tier_arguments

logger = get_logger(__name__)

PLUGIN = "metaqore_no_orphans"  # The entry point's name in setup.cfg.
CPU_BLOCK_TOKENS = 32  # vLLM's CPU kernels want a multiple of 32; the smallest gives the finest prefix hits.
CPU_KV_CACHE_GIB = 4.0  # Upper bound where kv_cache_gib is not set.
CPU_KV_CACHE_SHARE = 0.25  # Of the memory available at the start; the rest is for weights and other programs.
GIB = 2**30


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
        "enable_prefix_caching": caching.keeps_prefixes,
        "prefix_caching_hash_algo": vllm_hashes.ALGORITHM,
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
    return arguments | tier_arguments(settings, on_cpu=on_cpu) | engine.options


def structured_outputs_config() -> Any:
    """Return how schemas are followed where `engine.options` does not say.

    vLLM's own choice, "auto", takes another backend for what xgrammar refuses, but an engine runs only the backend of
    its first request: a later schema is then accepted by one and followed, in part, by the other. So there is one.
    Free whitespace is forbidden because a weak model can fill the whole answer with it.
    """
    from vllm.config import StructuredOutputsConfig

    return StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)


def set_environment(settings: Settings) -> None:
    """Set what vLLM reads from the environment only. What the operator has set himself stays, unless it is unsafe."""
    # Nothing about this host or its models is reported to others.
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A worker has many threads, and a forked child could inherit a lock that no thread of it will ever release.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    vllm_logs.set_environment()
    if Path(settings.engine.model_source).is_dir():
        # Nothing is to be downloaded, so that a start needs no network. HF_HUB_OFFLINE=0 allows it again.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        # The list is exclusive: an operator who names his own plugins would leave ours out.
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, PLUGIN)))
    if not entry_points(group="vllm.general_plugins", name=PLUGIN):
        logger.warning("a vLLM plugin is not installed: install this project, e.g. pip install -e .", plugin=PLUGIN)


def set_cpu_environment(*, eager: bool) -> None:
    """Set what vLLM and torch read on plain processors; `eager` tells that the model is not to be compiled."""
    # The model then runs inside EngineCore. AsyncLLM keeps EngineCore a process of its own in any case, so this
    # saves one process and its many seconds of imports.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Idle OpenMP threads sleep instead of spinning. On 2 cores this costs no throughput, and gives back a third of
    # a core to whatever else runs there, such as this worker.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if eager:
        # vLLM compiles a few small functions all the same, at the first request for log probabilities for instance:
        # that takes seconds, and without a C++ compiler on the machine it ends EngineCore.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _emulates_bfloat16() -> bool:
    """Tell whether this is an x86 without bfloat16 instructions, where it is four times slower than float32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text("ascii", errors="replace")
    except OSError:
        return True
    return "avx512_bf16" not in flags and "amx_bf16" not in flags
