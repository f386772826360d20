"""Differences between versions: right for any text, and bounded in time for hostile text."""

from __future__ import annotations

import difflib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_app.profiles import comparison
from gateway_app.profiles.comparison import compare
from tasks.prompts.profile import Profile, Segment, TextKind

texts = st.lists(st.sampled_from(["a", "b", "c\r", "", " ", "-", "+x", "\u2028"]), min_size=1, max_size=12).map(
    "\n".join
)
some_text = texts.filter(bool)


def profile(*roles: str, tools: tuple[str, ...] = ()) -> Profile:
    """Return a profile with these segments."""
    parts: list[tuple[TextKind, str]] = [("role", text) for text in roles] + [("tools", text) for text in tools]
    return Profile(agent="a", version=1, segments=tuple(Segment(kind=kind, text=text) for kind, text in parts))


def patched(old: str, diff: str) -> str:
    """Apply a unified diff, as `patch` does, without allowing for any shift."""
    told = diff.removesuffix("\n").split("\n")[2:]
    # A line without an end is told by another line after it.
    ends = ["" if following.startswith("\\") else "\n" for following in [*told[1:], ""]]
    before = [line + "\n" for line in old.split("\n")]
    before[-1] = before[-1][:-1]
    result: list[str] = []
    position = 0
    for line, end in zip(told, ends, strict=True):
        if line.startswith("@@"):
            start, _, length = line.split()[1][1:].partition(",")
            begin = int(start) - (1 if length != "0" else 0)
            result += before[position:begin]
            position = begin
        elif line[0] in " -+":
            if line[0] != "+":
                assert before[position] == line[1:] + end
                position += 1
            if line[0] != "-":
                result.append(line[1:] + end)
    return "".join(result + before[position:])


@settings(deadline=None)
@given(some_text, some_text)
def test_a_diff_leads_from_one_text_to_the_other(old: str, new: str) -> None:
    """As `patch` would apply it."""
    changes = compare(profile(old), profile(new)).changes
    assert len(changes) == (old != new)
    for change in changes:
        assert patched(old, change.diff) == new


@settings(deadline=None)
@given(some_text, some_text)
def test_a_diff_without_means_to_compare_is_as_true(old: str, new: str) -> None:
    """What is too long to be compared is shown as replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "MAX_LINE_PAIRS", 0)
        for change in compare(profile(old), profile(new)).changes:
            assert patched(old, change.diff) == new


@settings(deadline=None)
@given(st.lists(some_text, min_size=1, max_size=5), st.lists(some_text, min_size=1, max_size=5))
def test_segments_are_matched(old: list[str], new: list[str]) -> None:
    """Changes and what is equal add up to both versions."""
    found = compare(profile(*old), profile(*new))
    gone = {change.old_index for change in found.changes} - {None}
    come = {change.new_index for change in found.changes} - {None}
    assert [text for index, text in enumerate(old) if index not in gone] == [
        text for index, text in enumerate(new) if index not in come
    ]
    assert old[: found.shared_segments] == new[: found.shared_segments]


def test_one_put_in_is_one_change() -> None:
    """It is not taken for a change of all that follow it, nor of another kind."""
    (change,) = compare(profile("a", "b", tools=("t",)), profile("new", "a", "b", tools=("t",))).changes
    assert (change.kind, change.change, change.new_index, change.lines_added) == ("role", "added", 0, 1)
    (change,) = compare(profile("a", tools=("t",)), profile("a")).changes
    assert (change.kind, change.change, change.old_index, change.new_index) == ("tools", "removed", 1, None)


def test_it_reads_like_difflib() -> None:
    """Where the text ends with a line feed."""
    old = "".join(f"{number}\n" for number in range(40))
    new = old.replace("5\n", "five\n").replace("30\n", "")
    diff = compare(profile(old), profile(new)).changes[0].diff
    lines = old.splitlines(keepends=True), new.splitlines(keepends=True)
    assert diff == "".join(difflib.unified_diff(*lines, "role 0", "role 0"))


HOSTILE = {
    "many equal lines": ("a\n" * 120_000, "b\n" * 120_000),
    "repeats with noise": ("".join(f"a\nb{i}\n" for i in range(20_000)), "".join(f"a\nc{i}\n" for i in range(20_000))),
    "backwards": (
        "".join(f"{i}\n" for i in range(30_000)),
        "".join(f"{i}\n" for i in reversed(range(30_000))),
    ),
    "just within bounds": ("".join(f"a\nb{i}\n" for i in range(249)), "".join(f"a\nc{i}\n" for i in range(249))),
    "one line": ("x" * 250_000, "y" * 250_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_no_long_time(name: str) -> None:
    """Seconds of computing at worst, in one segment or in many."""
    old, new = HOSTILE[name]
    started = time.thread_time()
    compare(profile(old), profile(new))
    lines = len(old) // 32
    compare(
        profile(*(old[i * lines : (i + 1) * lines] for i in range(32))),
        profile(*(new[i * lines : (i + 1) * lines] for i in range(32))),
    )
    assert time.thread_time() - started < 10
