"""Model engines: what runs a prompt. `create_engine` makes the one the configuration names."""

from __future__ import annotations

from importlib.util import find_spec

from pydantic import ValidationError

from tasks.errors import ConfigurationError
from tasks.settings import Settings
from worker_gpu.engines.base import Engine


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
    from worker_gpu.engines.simulated_options import SimulationOptions

    engine, caching = settings.engine, settings.caching
    arguments = {
        "max_num_seqs": engine.max_num_seqs,
        "max_batch_tokens": settings.scheduling.max_batch_tokens,
        "prefix_caching": caching.keeps_prefixes,
        **({} if engine.max_model_len is None else {"max_model_len": engine.max_model_len}),
        **engine.options,
    }
    try:
        return SimulatedEngine(engine.model_name, SimulationOptions(**arguments))
    except ValidationError as error:
        # Values stay out of the message, as everywhere in the configuration.
        problems = "; ".join(
            ": ".join((".".join(map(str, item["loc"])) or "together", item["msg"]))
            for item in error.errors(include_input=False, include_url=False)
        )
        raise ConfigurationError(f"engine.options does not fit the simulated engine: {problems}") from None
