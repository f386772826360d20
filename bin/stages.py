"""The stages of an installation: commands that run one after another, and how they are shown.

It needs only the standard library, and its syntax is that of old Pythons, as bootstrap.py's is, which uses it.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

TAIL_LINES = 25


class Refusal(Exception):
    """This machine cannot run the gateway as it is; the message says what would help."""


class Stages:
    """Runs commands one after another and shows where they are; what they say goes to the log."""

    def __init__(self, count: int, lock: "object", root: str, python: str, log: str) -> None:
        """Take how many stages there will be, and the file whose lock each holds: it may outlive a killed bin/run.

        Commands run in the folder `root`; `python` is whose pip it is, `log` the file that is appended to.
        """
        self.lock, self.root, self.python, self.log = lock, root, python, log
        self.count, self.number, self.megabytes, self.now = count, 0, 0.0, ""
        self.terminal = sys.stderr.isatty()

    def skip(self) -> None:
        """Count a stage that has nothing to do."""
        self.number += 1

    def again(self) -> "Stages":
        """Let the next command count as part of the stage before."""
        self.number -= 1
        return self

    def pip(self, title: str, arguments: "list[str]", unless: str = "\0") -> bool:
        """Run `pip install`; see `run`."""
        # Python compiles a module when it first imports it; pip would compile 17,000 of which 5,000 are ever used.
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--no-compile"]
        return self.run(title, [self.python, "-m", "pip", "install"] + options + arguments, unless)

    def run(self, title: str, command: "list[str]", unless: str = "\0") -> bool:
        """Run one stage. Returns False if it failed and said `unless`; raises Refusal if it failed otherwise."""
        self.number, self.megabytes, self.now = self.number + 1, 0.0, ""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME")
        }
        environment["PIP_USER"] = "0"
        began = shown = time.monotonic()
        if not self.terminal:
            say("[%d/%d] %s" % (self.number, self.count, title))
        with open(self.log, "a", encoding="utf-8") as log:
            start = log.tell()
            log.write("$ %s\n" % " ".join(command))
            log.flush()
            process = None
            try:
                with uninterrupted():
                    process = subprocess.Popen(command, cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, errors="replace", pass_fds=[self.lock.fileno()])  # type: ignore[attr-defined]  # fmt: skip
                reader = threading.Thread(target=self._read, args=(process.stdout, log), daemon=True)
                reader.start()
                while process.poll() is None:
                    reader.join(0.5)
                    if self.terminal or time.monotonic() - shown >= 15:
                        shown = time.monotonic()
                        self._show(title, shown - began)
                    if not reader.is_alive():
                        process.wait()
            finally:
                if process is not None and process.poll() is None:
                    process.terminate()
                    process.wait()
            reader.join()
            process.stdout.close()  # type: ignore[union-attr]
        self.now = "done" if process.returncode == 0 else "failed"
        self._show(title, time.monotonic() - began, end="\n")
        if process.returncode == 0:
            return True
        with open(self.log, encoding="utf-8", errors="replace") as log:
            log.seek(start)
            said = log.read()
        if unless in said:
            return False
        tail = "\n".join("    " + line for line in said.strip().splitlines()[-TAIL_LINES:])
        raise Refusal(
            "%s could not be installed. pip said, last:\n%s\nAll of it is in %s. The next start goes on from here."
            % (title, tail, self.log)
        )

    def _read(self, output: "object", log: "object") -> None:
        for line in output:  # type: ignore[attr-defined]
            log.write(line)  # type: ignore[attr-defined]
            found = re.match(r"\s*Downloading (\S+?)-\d.*\(([\d.]+) (k|M|G)B", line)
            if found:
                self.now = found.group(1).split("/")[-1]
                self.megabytes += float(found.group(2)) * {"k": 0.001, "M": 1, "G": 1000}[found.group(3)]
            elif line.startswith("Installing collected packages"):
                self.now = "unpacking %d packages" % (line.count(",") + 1)

    def _show(self, title: str, seconds: float, end: str = "") -> None:
        size = "  %.0f MB" % self.megabytes if self.megabytes >= 1 else ""
        line = "[%d/%d] %s  %s%s  %s" % (self.number, self.count, title, clock(seconds), size, self.now)
        sys.stderr.write(
            "\r\033[K" + line[: shutil.get_terminal_size().columns - 1] + end
            if self.terminal
            else "      %s\n" % line[6:]
        )
        sys.stderr.flush()


@contextlib.contextmanager
def uninterrupted() -> "Iterator[None]":
    """Let what is raised by Ctrl-C come afterwards: within Popen, it would leave a process that nobody knows of."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is signal.default_int_handler]
    came = []  # type: list[int]
    for number in numbers:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def say(text: str) -> None:
    """Print one line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds."""
    return "%d:%02d" % divmod(int(seconds), 60)
