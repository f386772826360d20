"""vLLM's lines in our form, from this process and from those it starts.

vLLM would arrange logging by itself, and when it fails it shows what it was given: the scheduler's whole state with each request's
sampling parameters, in which are the stop words and schemas that clients sent. So it is kept from arranging anything, and its
loggers go the way of all others. In the engine's own processes nothing has been arranged then; vLLM calls `configure` there
(`worker_gpu.engines.plugin`) before it loads the model. Settings reach them by the environment.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import traceback
from typing import Any

from tasks import logs
from tasks.settings import settings

LEVEL = "VLLM_LOGGING_LEVEL"
#: What shows the engine's input when it fails.
_SHOWS_INPUT = "vllm.logging_utils.dump_input"
#: What warns of things that are meant (`worker_gpu.engines.vllm_tiers`): of blocks that an earlier worker left on disk only their
#: hashes are known; the name of host RAM's tier is removed before vLLM would do it; tiers are not all vLLM's own. And of each
#: tensor of a checkpoint that is not of the engine's type: that it is converted.
_WARNS_IN_VAIN = (
    "vllm.model_executor.models.utils",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.events",
    "vllm.distributed.kv_transfer.kv_connector.v1.base",
    "vllm.v1.kv_offload.cpu.shared_offload_region",
    "vllm.v1.kv_offload.factory",
    "vllm.v1.kv_offload.tiering.factory",
)


def set_environment() -> None:
    """Keep vLLM, here and in the processes it starts, from arranging logging; call it before vLLM is imported."""
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    os.environ.setdefault(LEVEL, "WARNING")
    _set_levels()


def configure() -> None:
    """Arrange logging in a process that vLLM has started."""
    if multiprocessing.parent_process() is None:
        return
    logs.ensure(settings().logs)
    _set_levels()
    # multiprocessing prints what ended its process, with its text. vLLM has logged it by then.
    traceback.print_exc = _print_nothing


def _set_levels() -> None:
    logging.getLogger("vllm").setLevel(os.environ.get(LEVEL, "").upper() or logging.WARNING)
    logging.getLogger(_SHOWS_INPUT).setLevel(logging.CRITICAL + 1)
    for name in _WARNS_IN_VAIN:
        logging.getLogger(name).setLevel(logging.ERROR)


def _print_nothing(*_arguments: Any, **_options: Any) -> None:
    """Stand in for `traceback.print_exc`."""
