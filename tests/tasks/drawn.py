"""The states of a request as docs/reliability.md draws and lists them, from the table in `tasks/states.py`.

Run as a module it writes them into the page: `python -m tests.tasks.drawn`.
"""

from __future__ import annotations

import re
from pathlib import Path

from tasks.schema import TERMINAL_STATES
from tasks.states import NOTHING, STEPS

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_DRAWING = re.compile(r"(?<=^```mermaid\nstateDiagram-v2\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(
    r"(?<=^\| from \| to \| by \| who \| event \| fenced by \|\n\|---\|---\|---\|---\|---\|---\|\n)(?:\|.*\n)*",
    re.MULTILINE,
)


def with_states(page: str) -> str:
    """Return the page with the drawing and the table that the steps give."""
    return _TABLE.sub(table(), _DRAWING.sub(drawing(), page, count=1), count=1)


def drawing() -> str:
    """Return the states and what leads from one to another, in Mermaid's words."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for step in STEPS:
        for source in step.sources:
            names = arrows.setdefault((_drawn(source), step.target), [])
            if step.by not in names:
                names.append(step.by)
    lines = [f"{source} --> {target}: {', '.join(names)}" for (source, target), names in arrows.items()]
    lines += [f"{state} --> [*]" for state in TERMINAL_STATES]
    return "".join(f"    {line}\n" for line in lines)


def table() -> str:
    """Return a row of a Markdown table for each step."""
    rows = (
        (
            ", ".join("–" if source == NOTHING else f"`{source}`" for source in step.sources),
            f"`{step.target}`",
            f"`{step.by}`",
            step.actor,
            ", ".join(f"`{kind}`" for kind in step.kinds) or "–",
            step.fence,
        )
        for step in STEPS
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _drawn(state: str) -> str:
    return "[*]" if state == NOTHING else state


if __name__ == "__main__":
    PAGE.write_text(with_states(PAGE.read_text("utf-8")), "utf-8")
