"""YAML for profiles: any profile reads back to the letter, and no file takes long, grows, or tells what is in it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_app.profiles.drafts import ProfileFile
from gateway_app.profiles.transfer import export
from tasks.prompts.profile import Example, FewShot, Profile, Segment
from tasks.prompts.profile_yaml import MAX_FILE_BYTES, BadYaml, dump, load

#: What block and quoted styles stumble over, mixed into whatever Hypothesis thinks of.
FRAGMENTS = [
    "\n", " ", "\t", "\r", "\r\n", "\x85", "\u2028", "\u2029", "\ufeff", "# ", ": ", "- ", "|", ">", "'", '"', "\\", "%",
    "&a", "*a", "!!x", "{", "}", "[", "]", ",", "?", "@", "`", "---", "...", "null", "true", "1e3", "0x1", "2024-01-01",
    "~", "=", "<<", "é", "漢", "🙂", "\xa0", "\ufffd", "text", "\n\n", "  \n",
]  # fmt: skip
_any = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5)
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), _any), min_size=1, max_size=12).map("".join)
written = texts.filter(lambda text: text.strip() != "")
names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..", "import")
)
text_segments = st.builds(Segment, kind=st.sampled_from(["agent_base_profile", "role", "tools"]), text=written)
examples = st.builds(Example, user=written, assistant=written)
exchanges = st.builds(FewShot, kind=st.just("few_shot"), examples=st.lists(examples, min_size=1, max_size=2).map(tuple))
ORDER = ("agent_base_profile", "role", "tools", "few_shot")


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Return any profile that can be drafted."""
    segments = draw(st.lists(st.one_of(text_segments, exchanges), min_size=1, max_size=3))
    agent, base = draw(names), draw(st.none() | names)
    return Profile(
        agent=agent,
        version=draw(st.integers(1, 2**31 - 1)),
        description=draw(st.just("") | texts),
        extends=None if base == agent else base,
        abstract=draw(st.booleans()),
        segments=tuple(sorted(segments, key=lambda segment: ORDER.index(segment.kind))),
    )


@settings(deadline=None, max_examples=150)
@given(profiles())
def test_a_profile_reads_back_to_the_letter(profile: Profile) -> None:
    """Exported and imported, it is the same, and so is the file that it is exported to again."""
    content = export(profile)
    file = ProfileFile.model_validate(load(content.encode()))
    assert file.profile(file.agent, file.version) == profile
    assert export(file.profile(file.agent, file.version)) == content


@settings(deadline=None)
@given(st.dictionaries(names, st.one_of(texts, st.integers(), st.booleans(), st.none(), st.lists(texts, max_size=3))))
def test_any_document_reads_back(document: dict[str, Any]) -> None:
    """Words that YAML takes for something else stay words."""
    assert load(dump(document).encode()) == document


def test_text_is_readable() -> None:
    """Plain lines are written as lines, so that versions can be compared and edited."""
    text = 'You are an agent.\n\n- Be brief: "always".\n  - Indented.\n'
    assert "|\n" in dump({"text": text})
    assert "- Indented.\n" in dump({"text": text})


def test_a_date_is_text() -> None:
    """No profile needs one, and `description: 2024-01-01` should say just that."""
    assert load(b"a: 2024-01-01\nb: 2024-99-99\nc: 1\nd: true\ne: ~") == {
        "a": "2024-01-01",
        "b": "2024-99-99",
        "c": 1,
        "d": True,
        "e": None,
    }


REFUSED: dict[str, tuple[bytes, str]] = {
    "an alias": (b"a: &x 1\nb: *x\n", "anchors and aliases are not allowed at line 1, column 4"),
    "a bomb": (b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "anchors and aliases"),
    "a merge key": (b"<<: {a: 1}\n", "a key must be a word"),
    "a tag": (b"a: !!python/name:os.system\n", "tags are not allowed"),
    "a plain tag": (b"a: !!str 1\n", "tags are not allowed"),
    "a key twice": (b"a: 1\nb: 2\na: 3\n", "more than once at line 3, column 1"),
    "a key twice, quoted": (b"a: 1\n'a': 3\n", "more than once"),
    "a list for a key": (b"? [a]\n: 1\n", "a key must be a word"),
    "two documents": (b"a: 1\n---\na: 2\n", "not valid YAML"),
    "not UTF-8": (b"a: \xff\n", "UTF-8"),
    "a NUL": (b"a: \x00\n", "cannot be read"),
    "a huge number": (b"a: " + b"1" * 5000, "cannot be read"),
    "deep": (b"[" * 100_000, "more than 16 levels"),
    "deep mappings": (b"{a: " * 100_000, "more than 16 levels"),
    "deep lists": (b"- " * 100_000, "more than 16 levels"),
    "many": (b"a: b\n" * 200_000, "20000 nodes"),
    "large": (b"#" * (MAX_FILE_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """Each is one message that tells where, soon, and repeats nothing of the file."""
    content, told = REFUSED[name]
    started = time.thread_time()
    with pytest.raises(BadYaml, match=told):
        load(content)
    assert time.thread_time() - started < 5


@given(st.binary(max_size=60) | texts.map(str.encode))
def test_any_bytes(content: bytes) -> None:
    """They are read or refused, and never anything else."""
    try:
        load(content)
    except BadYaml as error:
        assert len(str(error)) < 100
