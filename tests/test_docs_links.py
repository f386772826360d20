"""What the pages point at is there: files, headings, commands with their options, programs and settings' pages."""

from __future__ import annotations

import importlib.util
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from flask.cli import FlaskGroup

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
#: Links to other sites are not looked at.
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)\)")
#: A command on one line, up to what ends it in prose, in a table or in a shell.
FLASK = re.compile(r"\bflask ((?:[a-z]+[ ])*[a-z]+)((?: [^`|\n]*)?)")
#: The project's own, and not those of an environment, whose path goes on to the left.
PROGRAM = re.compile(r"(?<![\w./-])bin/([a-z]+)(?: ([a-z_]+))?")
MODULE = re.compile(r"python3? -m ([a-z_]+(?:\.[a-z_]+)+)")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")


def found(pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    """Return what pages say, each with its page, once."""
    said = set()
    for page in PAGES:
        for match in pattern.finditer(page.read_text("utf-8")):
            said.add((str(page.relative_to(ROOT)), *(word or "" for word in match.groups())))
    return sorted(said)


def anchors(page: Path) -> set[str]:
    """Return the names that a page's headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "target"), found(LINK))
def test_a_link(page: str, target: str) -> None:
    """It leads to a file, and to one of its headings if it names one."""
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists(), f"{page}: {target}"
    assert not anchor or anchor in anchors(file), f"{page}: {target}"


@pytest.mark.parametrize(("page", "words", "rest"), found(FLASK))
def test_a_flask_command(page: str, words: str, rest: str) -> None:
    """It is there, and takes the options it is shown with."""
    command: click.Command | None = FlaskGroup(load_dotenv=False)
    for plugin in entry_points(group="flask.commands"):
        assert isinstance(command, click.Group)
        command.add_command(plugin.load(), plugin.name)
    for word in words.split():
        if not isinstance(command, click.Group):
            break
        command = command.commands.get(word)
        assert command is not None, f"{page}: flask {words}: there is no {word}"
    assert command is not None
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    if not isinstance(command, click.Group):
        assert set(OPTION.findall(rest)) <= options | {"--help"}, f"{page}: flask {words}{rest}"


@pytest.mark.parametrize(("page", "program", "argument"), found(PROGRAM))
def test_a_program(page: str, program: str, argument: str) -> None:
    """It can be run; a benchmark that is named is there."""
    assert os.access(ROOT / "bin" / program, os.X_OK), f"{page}: bin/{program}"
    if program == "bench" and argument:
        assert (ROOT / "bench" / f"{argument}.py").is_file(), f"{page}: bin/bench {argument}"


@pytest.mark.parametrize(("page", "module"), found(MODULE))
def test_a_module(page: str, module: str) -> None:
    """It can be run."""
    assert importlib.util.find_spec(module) is not None, f"{page}: {module}"


def test_these_tests_see_what_there_is() -> None:
    """A pattern that finds nothing would let everything pass."""
    assert ("README.md", "docs/clients.md") in found(LINK)
    assert ("README.md", "keys create", " --organization NAME --name WHAT") in found(FLASK)
    assert ("README.md", "run", "") in found(PROGRAM)
    assert ("CONTRIBUTING.md", "gateway_app.openapi.error_page") in found(MODULE)
    assert "run-it" in anchors(ROOT / "README.md")
