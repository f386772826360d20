"""Profiles in YAML, and the hash chain that names them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ProfileError
from tasks.prompts.chain import hash_chain
from tasks.prompts.profile import Example, FewShot, Profile, read_profile, read_profiles

GOOD = """
agent: a
version: 1
segments:
  - {kind: agent_base_profile, text: "Base.\\n"}
  - {kind: role, text: "Role."}
"""
parts = st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), max_size=5)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """Write a profile's file."""
    path = folder / f"{name}.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_segments_are_joined_by_blank_lines(tmp_path: Path) -> None:
    """Line ends around a segment do not count."""
    assert read_profile(write(tmp_path, "a", GOOD)).text == "Base.\n\nRole."


BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "valid dictionary"),
    "no YAML": ("a: [", "not valid YAML at line 1, column 5"),
    "python tag": ("!!python/object/apply:os.system [ls]", "tags are not allowed"),
    "unknown field": (GOOD + "colour: red\n", "colour"),
    "unknown kind": (GOOD.replace("role", "soul"), "segments.1: kind must be one of"),
    "wrong order": (GOOD + '  - {kind: agent_base_profile, text: "x"}\n', "must come in the order"),
    "extends itself": (GOOD + "extends: a\n", "cannot extend itself"),
    "a key twice": (GOOD + "version: 2\n", "a key is given more than once at line"),
    "text among exchanges": (GOOD.replace("role, text", "few_shot, text"), "examples"),
    "exchanges before text": (
        GOOD.replace("segments:\n", "segments:\n  - {kind: few_shot, examples: [{user: u, assistant: a}]}\n"),
        "must come in the order",
    ),
    "half an exchange": (GOOD + "  - {kind: few_shot, examples: [{user: u}]}\n", "assistant"),
    "no segments": ("agent: a\nversion: 1\nsegments: []\n", "segments"),
    "version zero": (GOOD.replace("version: 1", "version: 0"), "version"),
    "version as text": (GOOD.replace("version: 1", 'version: "1"'), "version"),
    "control character in the name": (GOOD.replace("agent: a", 'agent: "a\\e[0m"'), "agent"),
    "not UTF-8": (b"agent: \xff\xfe\xff", "not encoded as UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_profiles(tmp_path: Path, name: str) -> None:
    """Each is one message that names file and field."""
    content, told = BAD[name]
    path = write(tmp_path, "bad", content)
    with pytest.raises(ProfileError, match=told) as error:
        read_profile(path)
    assert str(path) in error.value.detail


def test_two_files_for_one_agent(tmp_path: Path) -> None:
    """Which of them counts must not depend on their names."""
    write(tmp_path, "a", GOOD)
    write(tmp_path, "b", GOOD)
    with pytest.raises(ProfileError, match="already defines agent"):
        read_profiles(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    """A wrong path is said so."""
    with pytest.raises(ProfileError, match="profiles_directory"):
        read_profiles(tmp_path / "nowhere")


def test_a_huge_file(tmp_path: Path) -> None:
    """It is not even parsed."""
    with pytest.raises(ProfileError, match="larger than"):
        read_profile(write(tmp_path, "huge", "#" * (2**20 + 1)))


def test_the_shipped_profiles_share_their_base() -> None:
    """All but the base extend it, so that its part of the cache is shared."""
    profiles = read_profiles(Path(__file__).parents[3] / "profiles")
    assert set(profiles) == {"contract-validator", "engineering-base", "incident-responder", "migration-planner"}
    assert {profile.extends for profile in profiles.values() if not profile.abstract} == {"engineering-base"}
    assert [name for name, profile in profiles.items() if profile.abstract] == ["engineering-base"]


def test_exchanges_are_no_text() -> None:
    """They become messages; what names them is one to one, wherever the borders between them are."""
    profile = Profile.model_validate(
        {
            "agent": "a",
            "version": 1,
            "segments": [
                {"kind": "role", "text": "Role."},
                {"kind": "few_shot", "examples": [{"user": "a", "assistant": "b"}]},
                {"kind": "few_shot", "examples": [{"user": "c", "assistant": "d"}]},
            ],
        }
    )
    assert profile.text == "Role."
    assert [(one.user, one.assistant) for one in profile.examples] == [("a", "b"), ("c", "d")]
    pairs = (("a", "b"), ("ab", "x"), ("a", "bx"), ('a"', "b"), ("a", '"b'))
    contents = {FewShot(kind="few_shot", examples=(Example(user=u, assistant=a),)).content for u, a in pairs}
    assert len(contents) == len(pairs)


@given(salt=st.binary(max_size=8), first=parts, second=parts)
def test_chains_share_links_exactly_as_far_as_their_parts(
    salt: bytes, first: list[tuple[str, bytes]], second: list[tuple[str, bytes]]
) -> None:
    """Two chains have equal links while all parts so far are equal, and none after."""
    one, two = hash_chain(salt, first), hash_chain(salt, second)
    same = True
    for index, (a, b) in enumerate(zip(one, two, strict=False)):
        same = same and first[index] == second[index]
        assert (a.hash == b.hash) == same


@given(chain=parts.filter(bool))
def test_another_salt_is_another_chain(chain: list[tuple[str, bytes]]) -> None:
    """No link tells one organization what another uses."""
    one, two = hash_chain(b"one", chain), hash_chain(b"two", chain)
    assert {link.hash for link in one}.isdisjoint(link.hash for link in two)
