"""When this worker asks the queue for requests, and for what: the way between its admission and its consumer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tasks.queueing.pull import Wish
from worker_gpu.admission import Admission
from worker_gpu.engines.base import Engine
from worker_gpu.facts import Facts


class Pulling:
    """Asks for as much as `admission` allows, until the worker leaves. Any thread may use it."""

    def __init__(self, admission: Admission, engine: Engine, facts: Facts) -> None:
        self._admission, self._engine, self._facts = admission, engine, facts
        self._leaves = False
        self._look_again: Callable[[], object] = bool

    def begin(self, limit: int, look_again: Callable[[], object]) -> None:
        """Ask for up to `limit` requests at once; `look_again`, which is called from any thread, has the queue asked."""
        self._admission.max_requests, self._look_again = limit, look_again

    def leave(self) -> None:
        """Ask for nothing from now on."""
        self._leaves = True

    def wish(self) -> Wish:
        """Return what would be taken now."""
        wish = self._admission.wish(self._engine.load, self._facts.memory)
        return replace(wish, room=0) if self._leaves else wish

    @property
    def takes_more(self) -> bool:
        """Tell whether anything would be taken now. This is asked often."""
        return not self._leaves and self._admission.takes_more(self._engine.load, self._engine.limits.cache_tokens)

    def has_room(self) -> None:
        """Have the queue asked again: there may be room for others than before."""
        self._look_again()
