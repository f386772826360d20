"""What vLLM loads in every process it starts: an entry point in the group `vllm.general_plugins` (`setup.cfg`)."""

from __future__ import annotations

from worker_gpu.engines import vllm_logs
from worker_gpu.engines.orphans import die_with_parent


def enter() -> None:
    """Tie the process's life to that of the worker that started it, and have it log as the worker does."""
    die_with_parent()
    vllm_logs.configure()
