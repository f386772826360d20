"""Model engines: what runs a prompt. `create_engine` makes the one the configuration names."""

from __future__ import annotations

from importlib.util import find_spec

from tasks.errors import ConfigurationError
from tasks.settings import Settings
from worker_gpu.engines.base import Engine

SIMULATED_MODEL_LEN = 8192


def create_engine(settings: Settings) -> Engine:
    """Return the configured engine, not yet started.

    Raises ConfigurationError if vLLM is wanted and not installed, or if the simulation does not know an option.
    """
    if settings.engine.kind == "simulated":
        return _simulated(settings)
    if find_spec("vllm") is None:
        raise ConfigurationError(
            "vLLM is not installed: pip install 'metaqore-gateway[cuda]' on a host with NVIDIA GPUs, "
            "'metaqore-gateway[cpu]' on one without; or set METAQORE_ENGINE__KIND=simulated for tests without a model"
        )
    # Imported only where it is wanted, as is vLLM itself, which takes seconds.
    from worker_gpu.engines.vllm import VllmEngine

    return VllmEngine(settings)


def _simulated(settings: Settings) -> Engine:
    from worker_gpu.engines.simulated import SimulatedEngine

    engine, caching = settings.engine, settings.caching
    arguments = {
        "max_num_seqs": engine.max_num_seqs,
        "max_model_len": engine.max_model_len or SIMULATED_MODEL_LEN,
        "max_batch_tokens": settings.scheduling.max_batch_tokens,
        **({} if caching.kv_cache_enabled and caching.static_prefix_caching else {"cache_blocks": 0}),
        **engine.options,
    }
    try:
        return SimulatedEngine(engine.model_name, **arguments)
    except TypeError as error:
        raise ConfigurationError(f"engine.options does not fit the simulated engine: {error}") from None
