"""The engine's part in the worker's start and end.

Celery stops a worker in this order: it notices the signal at its loop's next turn, which may be seconds later; it cancels
the consumer; then it stops this step, and the connection comes last. So leasing is ended here, by Celery's own signal,
which is sent while the system's is handled. A second signal, or SIGQUIT, gives back at once what a first one would wait
for. Whatever Celery does meanwhile, nothing is lost by it: what is not given back has a lease that ends.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from celery import bootsteps
from celery.signals import worker_ready, worker_shutting_down
from celery.worker import state

from tasks.errors import GatewayError
from tasks.logs import get_logger
from tasks.settings import settings
from worker_gpu.runtime import Runtime

logger = get_logger(__name__)
#: sysexits' EX_SOFTWARE: a supervisor restarts the worker.
EXIT_ENGINE_DEAD = 70
#: sysexits' EX_CONFIG: starting again will not help.
EXIT_CONFIGURATION = 78


class EngineStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Loads the model before the consumer takes messages, and ends it after the consumer stopped."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        worker.runtime = None
        self._signals = 0

    def start(self, worker: Any) -> None:
        """Start the engine; blocks until the model is loaded."""
        runtime = Runtime(settings(), worker.hostname, lambda: _leave(worker), _leave_at_once)
        try:
            runtime.start()
        except GatewayError as error:
            logger.critical("the worker cannot start", detail=error.detail, hint=error.hint)
            raise SystemExit(EXIT_CONFIGURATION) from None
        worker.runtime = runtime

        def drain(how: str, **_signal: Any) -> None:
            self._signals += 1
            # The loop may be closed by then: there is nothing left to drain.
            with suppress(RuntimeError):
                runtime.drain(hurry=how == "Cold" or self._signals > 1)

        worker_shutting_down.connect(drain, weak=False)

    def stop(self, worker: Any) -> None:
        """Let what is running finish for a while, then end the engine."""
        if worker.runtime is not None:
            worker.runtime.stop()
            worker.consumer.tell_of_the_rest()
            worker.runtime = None

    def terminate(self, worker: Any) -> None:
        """End without waiting for what runs, which is given back."""
        if worker.runtime is not None:
            worker.runtime.drain(hurry=True)
        self.stop(worker)


@worker_ready.connect  # type: ignore[untyped-decorator]
def _announce(sender: Any, **_signal: Any) -> None:
    """Celery consumes from now on: the worker may say that it is ready."""
    if sender.controller.runtime is not None:
        sender.controller.runtime.announce()


def _leave(worker: Any) -> None:
    """End the process, for a supervisor to start another, once what it ran is given back."""
    logger.critical("this worker ends, and what it ran goes to another")
    # A stop, not a termination, for which Celery forgets the exit status.
    state.should_stop = EXIT_ENGINE_DEAD
    worker.consumer.call_soon(bool)


def _leave_at_once() -> None:
    """End the process where Celery does not get to it: it may wait for Redis, and an engine that hangs for nobody."""
    logger.critical("this worker ends at once, since its end takes too long; what is left has leases that end")
    os._exit(state.should_stop or os.EX_TEMPFAIL)
