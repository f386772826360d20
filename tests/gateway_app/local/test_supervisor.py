"""The supervisor, on stand-in services: what it starts again, what it gives up, and that it leaves nothing running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gateway_app.local.folder import Folder
from gateway_app.local.progress import Progress
from gateway_app.local.services import Service
from gateway_app.local.supervisor import ATTEMPTS, FIRST_DELAY_S, LONGEST_DELAY_S, Child, Supervisor
from tests.services import processes_in, wait_until

ROOT = Path(__file__).parents[3]
WAIT_S = 60.0
SLEEP = "import time; time.sleep(600)"
#: Writes its pid to the file named by its argument, then sleeps through every SIGTERM.
STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""
#: Starts another process, of its group but not its child to end, and leaves it.
PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""
#: Notes in a file when SIGTERM reached it, and ends.
NOTING = """
import pathlib, signal, sys, time
def note(*_):
    with open(sys.argv[1], "a") as file:
        file.write(sys.argv[2] + "\\n")
    sys.exit()
signal.signal(signal.SIGTERM, note)
pathlib.Path(sys.argv[1] + "." + sys.argv[2]).touch()
time.sleep(600)
"""
#: A supervisor of its own process, of one service that starts another process.
SUPERVISOR = f"""
import os, sys
from pathlib import Path
from gateway_app.local.folder import Folder
from gateway_app.local.progress import Progress
from gateway_app.local.services import Service
from gateway_app.local.supervisor import Supervisor
folder = Folder(Path(sys.argv[1]))
folder.make(0)
services = [Service(name, (sys.executable, "-c", {PARENT!r}, sys.argv[1] + "/" + name)) for name in ("one", "two")]
sys.exit(Supervisor(services, folder, os.environ, Progress()).run(lambda: None))
"""

Run = Callable[..., int]


@pytest.fixture
def run(folder: Folder) -> Iterator[Run]:
    """Return a function that supervises services while its second argument, the front, runs. Nothing may be left.

    Signal handlers are those of pytest again afterwards.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:  # In a shell's background, a test run ignores some.
        signal.signal(number, signal.SIG_DFL)

    def supervise(services: list[Service], front: Callable[[], int | None], interrupted: int = 0) -> int:
        try:
            return Supervisor(services, folder, os.environ, Progress()).run(front, interrupted)
        finally:
            assert processes_in(folder.root) == []
            assert list(folder.run.glob("*.pid")) == []

    try:
        yield supervise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes_in(folder.root):
            process.kill()


def test_a_killed_process_is_started_again(folder: Folder, run: Run) -> None:
    """`kill -9` of a service brings another process of it, and the user is told."""

    def front() -> int:
        first = running(folder, "sleeper")
        os.kill(first, signal.SIGKILL)
        second = wait_until(lambda: (pid := running(folder, "sleeper")) != first and pid, WAIT_S, "another process")
        assert psutil.Process(second).is_running()
        return 7

    assert run([sleeper()], front) == 7


def test_the_delay_doubles_and_starts_again_after_a_useful_life() -> None:
    """0.2 s, doubled at each further failure to a limit; a process that settled counts as none."""
    child = Child(Service("brief", ("true",), settle_s=10))
    delays = [end_after(child, lived_s=1) for _ in range(7)]
    assert delays == pytest.approx([FIRST_DELAY_S * 2**n for n in range(5)] + [LONGEST_DELAY_S] * 2)
    assert child.failures == 7
    assert end_after(child, lived_s=11) == pytest.approx(FIRST_DELAY_S)
    assert child.failures == 0
    assert [end_after(child, lived_s=1) for _ in range(2)] == pytest.approx([FIRST_DELAY_S, 2 * FIRST_DELAY_S])


def test_five_failures_in_a_row_end_everything(folder: Folder, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """The fifth ends the others too, with exit status 1, and shows what the service said last."""
    broken = Service("broken", (sys.executable, "-c", "print('canary of the log'); raise SystemExit(3)"))
    began = time.monotonic()
    assert run([sleeper(), broken], lambda: None) == 1
    assert time.monotonic() - began >= 0.2 + 0.4 + 0.8 + 1.6
    said = capfd.readouterr().err
    assert re.findall(r"broken ended with status 3; starting it again in ([\d.]+) s", said) == [
        "0.2",
        "0.4",
        "0.8",
        "1.6",
    ]
    assert "broken ended with status 3, for the 5th time in a row. Its log says, last:\n    canary of the log\n" in said
    assert str(folder.log("broken")) in said
    assert folder.log("broken").read_text().count("canary") == ATTEMPTS


def test_a_command_that_does_not_exist_ends_everything(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """It fails like any other, and the log's tail names it."""
    assert run([Service("absent", ("/no/such/program",))], lambda: None) == 1
    assert "/no/such/program cannot be started: No such file or directory" in capfd.readouterr().err


def test_a_later_service_waits_until_the_earlier_answers(folder: Folder, run: Run) -> None:
    """The second is not started before the first answers, and is not affected when that dies later."""
    answers: list[bool] = []
    first = Service("first", (sys.executable, "-c", SLEEP), answers=lambda: bool(answers))

    def front() -> int:
        pid = running(folder, "first")
        with pytest.raises(TimeoutError):
            wait_until((folder.run / "second.pid").exists, 0.5, "a process that must not be there")
        answers.append(True)
        second = running(folder, "second")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: running(folder, "first") != pid, WAIT_S, "another first")
        assert running(folder, "second") == second
        return 0

    assert run([first, sleeper("second")], front) == 0


def test_processes_end_in_reverse_order(folder: Folder, run: Run) -> None:
    """The last started ends first, each after the one before it has ended."""
    order = folder.root / "order"
    names = ["one", "two", "three"]
    services = [Service(name, (sys.executable, "-c", NOTING, str(order), name)) for name in names]

    def front() -> int:
        wait_until(lambda: all(Path(f"{order}.{name}").exists() for name in names), WAIT_S, "all services")
        return 0

    assert run(services, front) == 0
    assert order.read_text().split() == names[::-1]


def test_what_ignores_sigterm_is_killed(folder: Folder, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """After `stop_s`, and not before."""
    ready = folder.root / "ready"
    began: list[float] = []

    def front() -> int:
        wait_until(lambda: ready.exists() and ready.read_text(), WAIT_S, "the service")
        began.append(time.monotonic())
        return 0

    assert run([Service("stubborn", (sys.executable, "-c", STUBBORN, str(ready)), stop_s=0.5)], front) == 0
    assert 0.5 <= time.monotonic() - began[0] < 5
    assert "stubborn did not end in time and is killed" in capfd.readouterr().err


def test_what_does_not_answer_yet_is_not_waited_for(
    folder: Folder, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """A model that loads takes no SIGTERM and has nothing to finish, so Ctrl-C need not wait for it."""
    ready = folder.root / "ready"
    loading = Service("loading", (sys.executable, "-c", STUBBORN, str(ready)), stop_s=300, answers=lambda: False)

    def front() -> int:
        wait_until(lambda: ready.exists() and ready.read_text(), WAIT_S, "the service")
        return 0

    began = time.monotonic()
    assert run([loading], front) == 0
    assert time.monotonic() - began < WAIT_S
    assert "in time" not in capfd.readouterr().err, "that it is killed is no news"


def test_one_started_again_has_to_answer_again(folder: Folder, run: Run) -> None:
    """What the process before it said does not count for it."""
    asked: list[int] = []

    def answers() -> bool:
        asked.append(int((folder.run / "asked.pid").read_text()))
        return True

    def front() -> int:
        first = running(folder, "asked")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(set(asked)) == 2, WAIT_S, "a question to the second")
        return 0

    assert run([Service("asked", (sys.executable, "-c", SLEEP), answers=answers)], front) == 0


def test_descendants_end_with_their_service(folder: Folder, run: Run) -> None:
    """A grandchild is killed when its parent dies, before that is started again, and when everything ends."""
    file = folder.root / "grandchild"

    def grandchild() -> int:
        return int(wait_until(lambda: file.exists() and file.read_text(), WAIT_S, "the grandchild"))

    def front() -> int:
        first = grandchild()
        file.unlink()
        os.kill(running(folder, "parent"), signal.SIGKILL)
        wait_until(lambda: not alive(first), WAIT_S, "the end of the first grandchild")
        assert grandchild() != first
        return 0

    assert run([Service("parent", (sys.executable, "-c", PARENT, str(file)))], front) == 0
    assert not alive(grandchild())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(folder: Folder, run: Run, number: signal.Signals) -> None:
    """Each of the three, with the exit status that the caller wants then."""

    def front() -> None:
        running(folder, "sleeper")
        os.kill(os.getpid(), number)

    assert run([sleeper()], front) == 0
    assert run([sleeper()], front, 130) == 130


def test_a_second_signal_ends_the_patience(folder: Folder, run: Run) -> None:
    """What ignores SIGTERM is killed at once then, long before `stop_s`."""
    ready = folder.root / "ready"

    def front() -> None:
        wait_until(lambda: ready.exists() and ready.read_text(), WAIT_S, "the service")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(TimeoutError):
            wait_until(lambda: not alive(int(ready.read_text())), 0.5, "an end that must not come yet")
        os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    assert run([Service("stubborn", (sys.executable, "-c", STUBBORN, str(ready)), stop_s=300)], front) == 0
    assert time.monotonic() - began < WAIT_S


def test_a_signal_ends_the_patience_after_the_front_has_ended(folder: Folder, run: Run) -> None:
    """Everything is being ended already, so one signal is enough. The exit status stays what it was."""
    ready = folder.root / "ready"
    stubborn = Service("stubborn", (sys.executable, "-c", STUBBORN, str(ready)), stop_s=300)
    signaller = (
        "import os, pathlib, signal, sys, time\n"
        "def go(*_):\n    time.sleep(0.3); os.kill(int(sys.argv[1]), signal.SIGINT); sys.exit()\n"
        "signal.signal(signal.SIGTERM, go); pathlib.Path(sys.argv[2]).touch(); time.sleep(600)"
    )
    impatient = folder.root / "impatient"
    last = Service("last", (sys.executable, "-c", signaller, str(os.getpid()), str(impatient)))

    def front() -> int:
        wait_until(lambda: ready.exists() and ready.read_text() and impatient.exists(), WAIT_S, "both services")
        return 5

    began = time.monotonic()
    assert run([stubborn, last], front) == 5
    assert time.monotonic() - began < WAIT_S


def test_a_front_that_raises_ends_everything(folder: Folder, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever it raises, nothing is left running, and the exit status is 1."""

    def front() -> int:
        running(folder, "sleeper")
        raise LookupError("what the front ran into")

    assert run([sleeper()], front) == 1
    assert "error: LookupError: what the front ran into" in capfd.readouterr().err


def test_a_closed_terminal_is_no_reason_to_fail(folder: Folder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads the progress any more; processes are ended in order all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)

        def front() -> None:
            first = running(folder, "sleeper")
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: running(folder, "sleeper") != first, WAIT_S, "another process")
            os.kill(os.getpid(), signal.SIGHUP)

        assert run([sleeper()], front) == 0
        monkeypatch.undo()
        with suppress(BrokenPipeError):
            closed.close()


def test_kill_9_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    """The kernel ends the services then; their children lose nothing by staying, and are ended by the next start."""
    command = [sys.executable, "-c", SUPERVISOR, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            files = [tmp_path / "one", tmp_path / "two"]
            wait_until(lambda: all(file.exists() and file.read_text() for file in files), WAIT_S, "both services")
            services = [running(Folder(tmp_path), name) for name in ("one", "two")]
            process.kill()
            wait_until(lambda: not any(map(alive, services)), WAIT_S, "the end of the services")
        finally:
            process.kill()
            for left in processes_in(tmp_path):
                left.kill()


def sleeper(name: str = "sleeper") -> Service:
    """Return a service that does nothing."""
    return Service(name, (sys.executable, "-c", SLEEP))


def running(folder: Folder, name: str) -> int:
    """Return the process id of a service once it is its program, and no longer the launcher."""

    def find() -> int | None:
        try:
            process = psutil.Process(int((folder.run / f"{name}.pid").read_text()))
            return process.pid if "-c" in process.cmdline() else None
        except (OSError, ValueError, psutil.Error):
            return None

    return wait_until(find, WAIT_S, f"{name} to run") or 0


def alive(pid: int) -> bool:
    """Tell whether a process runs. One that only waits to be noticed by its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_after(child: Child, lived_s: float) -> float:
    """Let a child's process end after a life of so many seconds; return the delay until its next start."""
    now = time.monotonic()
    child.process = subprocess.Popen([sys.executable, "-S", "-c", ""], start_new_session=True)
    child.process.wait()
    child.started_at = now - lived_s
    assert child.ended(now) == 0
    assert child.start_at is not None
    return child.start_at - now
