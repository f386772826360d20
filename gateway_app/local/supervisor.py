"""Keeping processes running, and ending them all.

One loop in the main thread, woken by signals, by the end of a child and ten times a second:

- a process that ended is started again after 0.2 s, and twice that at each further failure, up to 5 s. One that lived
  long enough to have been of use starts at 0.2 s again. One that fails to start five times in a row ends everything;
- the next process of the list is started once those before it answer;
- SIGINT, SIGTERM or SIGHUP end everything in reverse order: SIGTERM, some patience, then SIGKILL to the group. A signal
  that comes while everything is being ended already ends the patience.

`front`, what talks to the user, runs in a thread meanwhile. If it returns a number, everything ends with that as the
exit status. Children are only ever started in the main thread; see launcher.py for why.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from gateway_app.local import processes
from gateway_app.local.folder import Folder
from gateway_app.local.progress import Progress
from gateway_app.local.services import Service

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0
ATTEMPTS = 5
TICK_S = 0.1
#: One that does not answer yet gets no more than this to end: it has nothing to finish.
UNANSWERED_STOP_S = 1.0
FAILED = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Child:
    """One service: its process, if it runs, and how it has fared."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.start_at: float | None = None
        self.failures = 0
        self.answered = service.answers is None

    def ended(self, now: float) -> int | None:
        """Return the exit status if the process has just ended, having planned its next start."""
        if self.process is None or (status := self.process.poll()) is None:
            return None
        processes.kill_group(self.process.pid)
        self.process = None
        self.failures = self.failures + 1 if now - self.started_at < self.service.settle_s else 0
        self.start_at = now + min(FIRST_DELAY_S * 2 ** max(self.failures - 1, 0), LONGEST_DELAY_S)
        return status


class Supervisor:
    """Runs services until told to stop. `environment` is the whole environment of each process."""

    def __init__(
        self, services: Sequence[Service], folder: Folder, environment: Mapping[str, str], progress: Progress
    ) -> None:
        self._children = [Child(service) for service in services]
        self._folder, self._environment, self._progress = folder, environment, progress
        self._patient = True
        self._interrupted = 0
        self._status: int | None = None
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)

    def run(self, front: Callable[[], int | None], interrupted: int = 0) -> int:
        """Start everything, keep it running, end it. Returns the exit status: `interrupted` after a signal."""
        self._interrupted = interrupted
        for child in self._children:
            self._folder.rotate_log(child.service.name)
        self._listen()
        threading.Thread(target=self._front, args=(front,), name="front", daemon=True).start()
        try:
            while self._status is None:
                self._tick()
                self._sleep(TICK_S)
        finally:
            self._stop()
        return self._status

    @property
    def ending(self) -> bool:
        """Tell whether everything is being ended, so that nothing need be waited for any more."""
        return self._status is not None

    def _listen(self) -> None:
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and means it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        if self._status is None:
            self._status = self._interrupted
        else:
            self._patient = False

    def _front(self, front: Callable[[], int | None]) -> None:
        try:
            status = front()
        except Exception as error:  # Whatever it is, processes must not be left running for want of someone to see it.
            if not self.ending:
                self._progress.say(f"error: {type(error).__name__}: {error}")
            status = FAILED
        if status is not None and self._status is None:
            self._status = status
        with suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    def _tick(self) -> None:
        for child in self._children:
            now = time.monotonic()
            status = child.ended(now)
            if status is not None:
                self._report(child, status, now)
            if self._status is not None:
                return
            if child.process is None and (child.start_at is None or child.start_at <= now):
                self._start(child)
            if not child.answered and child.service.answers is not None:
                child.answered = child.process is not None and child.service.answers()
            if not child.answered:
                return

    def _start(self, child: Child) -> None:
        service = child.service
        with self._folder.open_log(service.name) as log:
            child.process = processes.start(
                service.command,
                folder=self._folder.root,
                environment=self._environment,
                log=log,
                death_signal=service.death_signal,
            )
        child.started_at = time.monotonic()
        child.answered = service.answers is None
        self._folder.write_private(self._pid_file(child), f"{child.process.pid}\n")

    def _report(self, child: Child, status: int, now: float) -> None:
        name = child.service.name
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if child.failures >= ATTEMPTS:
            self._progress.say(f"error: {name} {how}, for the {ATTEMPTS}th time in a row. Its log says, last:")
            self._progress.say(self._folder.log_tail(name))
            self._progress.say(f"All of it is in {self._folder.log(name)}")
            self._status = FAILED
        elif child.start_at is not None:
            self._progress.say(f"{name} {how}; starting it again in {child.start_at - now:.1f} s")

    def _stop(self) -> None:
        """End every process, the last started first. Leaves nothing running, whatever happens meanwhile."""
        for child in reversed(self._children):
            if child.process is not None and child.process.poll() is None:
                self._progress.wait(f"{child.service.name} to end", 0)
                child.process.terminate()
                patience_s = child.service.stop_s if child.answered else UNANSWERED_STOP_S
                deadline = time.monotonic() + patience_s
                while child.process.poll() is None and time.monotonic() < deadline and self._patient:
                    self._sleep(processes.EXIT_POLL_S)
                if child.process.poll() is None and child.answered:
                    self._progress.say(f"{child.service.name} did not end in time and is killed")
            if child.process is not None:
                processes.kill(child.process)
            with suppress(OSError):
                self._pid_file(child).unlink(missing_ok=True)
        self._progress.clear()
        signal.set_wakeup_fd(-1)

    def _sleep(self, seconds: float) -> None:
        if select.select([self._woken], [], [], seconds)[0]:
            os.read(self._woken, 4096)

    def _pid_file(self, child: Child) -> Path:
        return self._folder.run / f"{child.service.name}.pid"
