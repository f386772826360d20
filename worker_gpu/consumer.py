"""Where Celery ends and the engine begins.

Celery's consumer receives a message, and this one hands it to the engine's own event loop (`worker_gpu.runtime`), where
every request runs beside the others and the engine batches them. Nothing of Celery's acknowledging applies: the message
stays leased until its request has ended or is given back, and Celery only gets its consumer's credit back.

Celery silently acknowledges or rejects what was revoked, has expired, or cannot be read, and logs the bodies of most of it.
None of that happens to our queue's messages: they never come to Celery's own handling, and every hook by which it
could get hold of one is overridden. One that cannot be read is set aside, without a word of its content in the log. If a
request stands behind it, the database knows it, and it is published again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import bootsteps, current_app, shared_task
from celery.worker import state
from celery.worker.consumer.tasks import Tasks
from celery.worker.request import Request
from kombu.message import Message

from tasks.errors import MessageRejected
from tasks.logs import get_logger
from tasks.queueing.keys import TASK_NAME
from tasks.queueing.properties import record_of
from tasks.queueing.reconnecting import Consumer
from worker_gpu import control  # noqa: F401  its commands register themselves
from worker_gpu.delivery import Delivery, read, tag_of
from worker_gpu.engine_step import EngineStep
from worker_gpu.runtime import Runtime
from worker_gpu.scopes import Outcome

logger = get_logger(__name__)


class QueueConsumer(Consumer):
    """Celery's consumer, for messages that are leased."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: What has ended, and Celery has not heard of yet.
        self._ended: deque[tuple[Request, Outcome, float]] = deque()

    @property
    def runtime(self) -> Runtime:
        """Return what runs the requests; Celery starts it before the consumer."""
        runtime: Runtime = self.controller.runtime
        return runtime

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Any], None]:
        """Return the function that is called with each message."""
        others: Callable[[Any], None] = super().create_task_handler(*arguments, **options)

        def on_task_received(message: Any) -> None:
            if tag_of(message) is None:
                others(message)
                return
            try:
                delivery = read(message)
            except MessageRejected as error:
                self._set_aside(message, error.detail)
            else:
                self._take(message, delivery)

        return on_task_received

    def on_unknown_message(self, _body: Any, message: Any) -> None:
        """Refuse what is no task."""
        self._set_aside(message, "the message is no task")

    def on_unknown_task(self, _body: Any, message: Any, _exc: Any) -> None:
        """Refuse what is no task of ours."""
        self._set_aside(message, "the message asks for an unknown task")

    def on_invalid_task(self, _body: Any, message: Any, _exc: Any) -> None:
        """Refuse what the task cannot be called with."""
        self._set_aside(message, "the task is invalid")

    def on_decode_error(self, message: Any, exc: Any) -> None:
        """Refuse what cannot be decoded. The error's text may quote it."""
        self._set_aside(message, f"the message cannot be read: {type(exc).__name__}")

    def tell_of_the_rest(self) -> None:
        """Tell whoever watches of what ended while the worker drained: Celery's loop, which sends events, has ended."""
        self._finish()
        if self.event_dispatcher is not None:
            with suppress(*self.connection_errors):
                self.event_dispatcher.flush()

    def cancel_active_requests(self) -> None:
        """Give back what runs, at once: Celery would have its pool terminate it."""
        self.runtime.drain(hurry=True)

    def _take(self, message: Any, delivery: Delivery) -> None:
        request = _shown(self, message, delivery)
        request.send_event("task-received", name=request.name, args=request.argsrepr, kwargs="{}")
        state.task_reserved(request)
        state.task_accepted(request)
        request.send_event("task-started")

        def done(outcome: Outcome, seconds: float) -> None:
            self._ended.append((request, outcome, seconds))
            self.call_soon(self._finish)

        self.runtime.submit(delivery, done)

    def _finish(self) -> None:
        """Back on Celery's loop: return the consumer's credit and tell whoever watches."""
        while self._ended:
            request, outcome, seconds = self._ended.popleft()
            state.task_ready(request, successful=outcome == "completed")
            request.acknowledge()
            _tell(request, outcome, seconds)

    def _set_aside(self, message: Any, why: str) -> None:
        """Refuse a message. Where it is leased it is out of the queue; where it is not, the queue has it no more."""
        tag = tag_of(message)
        logger.error("a message is refused", tag=tag, why=why)
        if tag is not None:
            self.runtime.refuse(tag, record_of(message), why)
        if hasattr(message, "ack_log_error"):
            message.ack_log_error(logger, self.connection_errors)


class Room(bootsteps.StartStopStep):
    """Has the queue asked for what the engine can run, as soon as it can, and for nothing once the worker drains.

    Celery counts what its connection delivered, and after a reconnect it begins anew, while the requests go on. So what
    the worker has in hand is asked too, each time.
    """

    requires = (Tasks,)

    def __init__(self, consumer: QueueConsumer, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._alarm: Any = None

    def start(self, consumer: QueueConsumer) -> None:
        """Tie the connection's channel to what the worker takes on."""
        channel, pulling = consumer.task_consumer.channel, consumer.runtime.pulling
        has_credit, hub = channel.qos.can_consume, consumer.hub

        def look_again() -> None:
            # Of a connection that is closed there is nothing to look for.
            if consumer.task_consumer is not None and consumer.task_consumer.channel is channel:
                channel.look_again()

        def call_later(seconds: float) -> None:
            self.stop(consumer)
            self._alarm = hub.call_later(seconds, look_again)

        channel.worker, channel.wish, channel.call_later = consumer.hostname, pulling.wish, call_later
        channel.qos.can_consume = lambda: pulling.takes_more and has_credit()
        pulling.begin(consumer.pool.num_processes, lambda: consumer.call_soon(look_again))

    def stop(self, consumer: QueueConsumer) -> None:
        """Forget when to look again: what is known of it is of another moment, or connection."""
        del consumer
        if self._alarm is not None:
            self._alarm.cancel()


def _shown(consumer: QueueConsumer, message: Any, delivery: Delivery) -> Request:
    """Return what Celery, its remote control and Flower see of a request: its id, and nothing else that was in the message.

    Most of that was never verified, and Celery trusts all of it.
    """
    request_id = delivery.tag.rpartition(":")[0]
    headers = {"task": TASK_NAME, "id": request_id, "root_id": request_id, "argsrepr": request_id, "kwargsrepr": "{}"}
    return Request(
        Message(delivery_tag=message.delivery_tag, delivery_info={}, properties={}),
        on_ack=message.ack_log_error,
        on_reject=message.reject_log_error,
        app=consumer.app,
        hostname=consumer.hostname,
        eventer=consumer.event_dispatcher,
        connection_errors=consumer.connection_errors,
        headers=headers,
        body=((), {}, {}),
        decoded=True,
    )


def _tell(request: Request, outcome: Outcome, seconds: float) -> None:
    """Send the event that Celery has for what became of a request. What has gone back into the queue is tried again."""
    if outcome == "completed":
        request.send_event("task-succeeded", result="", runtime=seconds)
    elif outcome in ("cancelled", "expired"):
        request.send_event("task-revoked", terminated=False, signum=None, expired=outcome == "expired")
    elif outcome in ("queued", "fenced"):
        request.send_event("task-retried", exception="", traceback="")
    else:
        request.send_event("task-failed", exception="", traceback="")


@shared_task(name=TASK_NAME)
def generate(*_args: Any) -> None:
    """Run one agent request; the consumer above has it done, so this body is never reached."""
    raise RuntimeError("this task runs on the engine's loop, not in a pool")


current_app.steps["worker"].add(EngineStep)
current_app.steps["consumer"].add(Room)
current_app.conf.worker_consumer = f"{__name__}:{QueueConsumer.__name__}"
# The reduction is for tasks that a reconnect may deliver twice; `Room` counts what really runs.
current_app.conf.worker_enable_prefetch_count_reduction = False
