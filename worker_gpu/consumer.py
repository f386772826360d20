"""Where Celery ends and the engine begins.

Celery's consumer receives a message and asks the task's `Strategy` what to do with it. The usual strategy hands it to
the pool; ours hands it to the engine's own event loop (`worker_gpu.runtime`), where every request runs beside the
others and the engine batches them. Nothing of Celery's acknowledging applies: the message stays leased until the
request's terminal event is committed, and Celery only gets its consumer's credit back. A revoke is not obeyed here,
since it would end a request without a record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Task, bootsteps, current_app, shared_task
from celery.signals import worker_ready
from celery.worker import state
from celery.worker.request import Request

from tasks.errors import GatewayError
from tasks.queueing.keys import TASK_NAME
from tasks.queueing.transport import lease_tag
from tasks.settings import settings
from worker_gpu.runtime import Runtime

logger = logging.getLogger(__name__)
#: sysexits' EX_SOFTWARE: a supervisor restarts the worker.
EXIT_ENGINE_DEAD = 70
#: sysexits' EX_CONFIG: starting again will not help.
EXIT_CONFIGURATION = 78


class EngineStep(bootsteps.StartStopStep):
    """Loads the model before the consumer takes messages, and ends it after the consumer stopped."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        worker.runtime = None

    def start(self, worker: Any) -> None:
        """Start the engine; blocks until the model is loaded."""
        runtime = Runtime(settings(), worker.hostname, on_dead=_leave)
        try:
            runtime.start()
        except GatewayError as error:
            logger.critical("the worker cannot start: %s %s", error.detail, error.hint)
            raise SystemExit(EXIT_CONFIGURATION) from None
        worker.runtime = runtime

    def stop(self, worker: Any) -> None:
        """Let what is running finish for a while, then end the engine."""
        if worker.runtime is not None:
            worker.runtime.stop()
            worker.runtime = None

    def terminate(self, worker: Any) -> None:
        """End as `stop` does: a second signal is for Celery to count, not for us."""
        self.stop(worker)


def strategy(_task: Task[Any, Any], app: Any, consumer: Any, **_options: Any) -> Callable[..., None]:
    """Return the function that Celery calls with each message."""
    runtime: Runtime = consumer.controller.runtime
    events = consumer.event_dispatcher

    def on_message(message: Any, _body: Any, ack: Any, reject: Any, _callbacks: Any) -> None:
        request = Request(
            message,
            on_ack=ack,
            on_reject=reject,
            app=app,
            hostname=consumer.hostname,
            eventer=events,
            connection_errors=consumer.connection_errors,
        )
        args, _kwargs, _embed = message.payload
        request.send_event("task-received", name=request.name, args=request.argsrepr, kwargs="{}")
        state.task_reserved(request)
        state.task_accepted(request)
        request.send_event("task-started")

        def done(succeeded: bool, seconds: float) -> None:
            consumer.call_soon(_finish, request, succeeded, seconds)

        runtime.submit(args[0] if args else None, lease_tag(message.delivery_tag), done)

    return on_message


def _finish(request: Request, succeeded: bool, seconds: float) -> None:
    """Back on Celery's loop: return the consumer's credit and tell whoever watches."""
    state.task_ready(request, successful=succeeded)
    request.acknowledge()
    if succeeded:
        request.send_event("task-succeeded", result="", runtime=seconds)
    else:
        request.send_event("task-failed", exception="", traceback="")


@worker_ready.connect
def _announce(sender: Any, **_signal: Any) -> None:
    """Celery consumes from now on: the worker may say that it is ready."""
    if sender.controller.runtime is not None:
        sender.controller.runtime.announce()


def _leave() -> None:
    logger.critical("the engine is dead; this worker ends, and what it ran goes to another")
    state.should_terminate = EXIT_ENGINE_DEAD


@shared_task(name=TASK_NAME, Strategy=f"{__name__}:strategy")
def generate(*_args: Any) -> None:
    """Run one agent request; the strategy above does it, so this body is never reached."""
    raise RuntimeError("this task runs on the engine's loop, not in a pool")


current_app.steps["worker"].add(EngineStep)
