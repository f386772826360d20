"""What an agent's requests get: shipped files below an organization's own versions, and no profile at all."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway_app.governance.api_keys import Caller
from gateway_app.profiles import ActiveProfile, Profiles, trial
from gateway_app.profiles.catalogue import Catalogue
from gateway_app.profiles.drafts import ActivateVersion, NewAgent, NewVersion
from gateway_app.profiles.management import ProfileManagement, manage
from gateway_app.profiles.sealing import Inherited
from gateway_app.profiles.shipped import last_changed, shipped_inheritance
from gateway_app.profiles.switching import Activated
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.errors import GatewayError, ProfileError, ProfileExists, ProfileUnusable, ServiceUnavailable, UnknownAgent
from tasks.ids import new_request_id
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import Profile, Segment, TextKind
from tasks.prompts.tokenizer import ModelTokenizer
from tasks.settings import ProfilesGroup, settings
from worker_gpu.profiles import StaticParts

LONG_AGO = datetime(2020, 1, 2, tzinfo=UTC)
CALLER = Caller("key_1", "acme")
ROLE = (Segment(kind="role", text="Role."),)
KEYS = KeyWrapper((b"k" * 32,))
REQUEST = new_request_id()


@dataclass(frozen=True)
class Managing:
    """What an organization may do, in few words."""

    management: ProfileManagement

    def create(self, caller: Caller, draft: NewAgent) -> int:
        """Make an agent."""
        return self.management.editor.create(caller, draft).version

    def add(self, caller: Caller, agent: str, draft: NewVersion) -> int:
        """Add a version."""
        return self.management.editor.add(caller, agent, draft).version

    def activate(self, caller: Caller, agent: str, version: int) -> Activated:
        """Make a version active."""
        return self.management.switch.activate(caller, agent, ActivateVersion(version=version))

    @property
    def catalogue(self) -> Catalogue:
        """Return what is shown."""
        return self.management.catalogue


Gateway = Callable[..., tuple[Profiles, Managing]]


@pytest.fixture
def database(configured: None) -> Iterator[Database]:
    """Return an empty database with tables."""
    database = Database(settings().database)
    yield database
    database.close()


@pytest.fixture
def gateway(database: Database, tiny_model: Path) -> Gateway:
    """Return what starts the profiles of a gateway process that shipped these agents, in these versions."""

    def start(keys: KeyWrapper = KEYS, window: int = 2048, **versions: int) -> tuple[Profiles, Managing]:
        shipped = {
            agent: Profile(agent=agent, version=version, segments=(Segment(kind="role", text=f"File {version}."),))
            for agent, version in versions.items()
        }
        tokenizer = ModelTokenizer(tiny_model)
        settings = {"model_name": "tiny", "salt": b"s" * 32, "database": database, "keys": keys}
        profiles = Profiles(shipped, tokenizer, **settings, shipped_at=LONG_AGO)  # type: ignore[arg-type]
        return profiles, Managing(manage(profiles, database, keys, window, ProfilesGroup()))

    return start


def new_version(text: str = "Own.", *, activate: bool = True) -> NewVersion:
    """Return a version to add."""
    return NewVersion(segments=(Segment(kind="role", text=text),), activate=activate)


def text_of(active: ActiveProfile) -> tuple[int, str]:
    """Return version and text."""
    return active.profile.version, active.profile.text


def test_files_are_the_base_layer(gateway: Gateway) -> None:
    """An organization without an active version of its own follows the files, through all releases."""
    profiles, editor = gateway(a=3)
    assert text_of(profiles.get("acme", "a", REQUEST)) == (3, "File 3.")
    assert editor.add(CALLER, "a", new_version()) == 4
    assert text_of(profiles.get("acme", "a", REQUEST)) == (4, "Own.")
    assert text_of(profiles.get("other", "a", REQUEST)) == (3, "File 3.")
    profiles, editor = gateway(a=9)
    assert text_of(profiles.get("acme", "a", REQUEST)) == (4, "Own.")
    assert editor.add(CALLER, "a", new_version("Later.", activate=False)) == 10
    assert editor.activate(CALLER, "a", 9).previous_version == 4
    assert text_of(profiles.get("acme", "a", REQUEST)) == (9, "File 9.")
    profiles, editor = gateway(a=10)
    assert text_of(profiles.get("acme", "a", REQUEST)) == (10, "File 10.")


def test_a_file_with_the_number_of_an_own_version(gateway: Gateway) -> None:
    """What a number meant to an organization it goes on to mean; both are listed."""
    _, editor = gateway(a=1)
    editor.add(CALLER, "a", new_version())
    profiles, editor = gateway(a=2)
    catalogue = editor.catalogue
    assert text_of(profiles.get("acme", "a", REQUEST)) == (2, "Own.")
    overview, entries = catalogue.show("acme", "a")
    assert [(entry.version, entry.source) for entry in entries] == [(2, "api"), (2, "file")]
    assert overview.active == entries[0]
    assert catalogue.version("acme", "a", 2)[1].text == "Own."
    assert editor.activate(CALLER, "a", 2).active.profile.text == "Own."


def test_a_file_that_is_gone(gateway: Gateway) -> None:
    """Own versions stay; who followed the file has no active version."""
    _, editor = gateway(a=1, b=1)
    editor.add(CALLER, "a", new_version())
    editor.add(CALLER, "b", new_version(activate=False))
    profiles, editor = gateway()
    assert text_of(profiles.get("acme", "a", REQUEST)) == (2, "Own.")
    with pytest.raises(UnknownAgent) as error:
        profiles.get("acme", "b", REQUEST)
    assert error.value.extensions == {"agents": ["a"]}
    assert editor.catalogue.show("acme", "b")[0].active is None
    assert editor.activate(CALLER, "b", 2).previous_version is None
    assert text_of(profiles.get("acme", "b", REQUEST)) == (2, "Own.")


def test_a_file_that_came_later(gateway: Gateway) -> None:
    """An organization that had made an agent of that name keeps its own, and can choose the file."""
    _, editor = gateway()
    editor.create(CALLER, NewAgent(agent="a", segments=ROLE, activate=True))
    profiles, editor = gateway(a=7)
    assert text_of(profiles.get("acme", "a", REQUEST)) == (1, "Role.")
    editor.activate(CALLER, "a", 7)
    assert text_of(profiles.get("acme", "a", REQUEST)) == (7, "File 7.")
    with pytest.raises(ProfileExists):
        editor.create(CALLER, NewAgent(agent="a", segments=ROLE))


def test_names(gateway: Gateway) -> None:
    """Those that requests may name, in order, with when they were made."""
    profiles, editor = gateway(m=1)
    editor.create(CALLER, NewAgent(agent="z", segments=ROLE))
    editor.create(CALLER, NewAgent(agent="b", segments=ROLE, activate=True))
    editor.add(CALLER, "m", new_version())
    (first, made), second = profiles.names("acme")
    assert (first, second) == ("b", ("m", LONG_AGO))
    assert made.tzinfo is not None
    assert profiles.names("other") == [("m", LONG_AGO)]


def test_no_profile(gateway: Gateway) -> None:
    """Requests without an agent share a hash of their organization's own, and nothing else."""
    profiles, _ = gateway(a=1)
    cold = profiles.cold("acme")
    assert (cold.profile.agent, cold.profile.version, cold.profile.text) == ("", 0, "")
    assert cold.layout.static_token_ids == ()
    hashes = {cold.static_profile_hash, profiles.cold("other").static_profile_hash}
    assert len(hashes | {profiles.get("acme", "a", REQUEST).static_profile_hash}) == 3
    assert profiles.cold("acme") is cold
    assert gateway(a=1)[0].cold("acme").static_profile_hash == cold.static_profile_hash


def test_workers_find_the_static_part(gateway: Gateway, database: Database, tiny_model: Path) -> None:
    """Of every profile that a request may get, by the hash that its message carries."""
    profiles, editor = gateway(a=1)
    editor.add(CALLER, "a", new_version())
    editor.create(CALLER, NewAgent(agent="b", segments=ROLE))
    editor.activate(CALLER, "b", 1)
    found = [
        profiles.get("acme", "a", REQUEST),
        profiles.get("acme", "b", REQUEST),
        profiles.get("other", "a", REQUEST),
        profiles.cold("acme"),
    ]
    parts = StaticParts(database, KEYS, ModelTokenizer(tiny_model).fingerprint)

    async def load() -> list[list[int]]:
        return [list((await parts.get(active.static_profile_hash)).token_ids) for active in found]

    assert asyncio.run(load()) == [list(active.layout.static_token_ids) for active in found]
    assert [len(ids) > 0 for ids in asyncio.run(load())] == [True, True, True, False]


def test_tokenising_happens_at_activation(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the path of requests, but for a process that meets the version for the first time."""
    profiles, editor = gateway(a=1)
    editor.add(CALLER, "a", new_version("One.", activate=False))
    editor.add(CALLER, "a", new_version("Two."))
    editor.activate(CALLER, "a", 2)
    editor.activate(CALLER, "a", 3)
    other, _ = gateway(a=1)
    made = []
    original = PromptLayout.__init__

    def counted(*arguments: object) -> None:
        made.append(1)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PromptLayout, "__init__", counted)
    for version in (2, 3, 2):
        editor.activate(CALLER, "a", version)
        assert profiles.get("acme", "a", REQUEST).profile.version == version
    assert made == []
    assert [other.get("acme", "a", REQUEST).profile.version for _ in range(3)] == [2] * 3
    assert made == [1]


def test_a_smaller_model_is_served(gateway: Gateway) -> None:
    """What was activated before stays active; it cannot be activated again."""
    _, editor = gateway(a=1)
    editor.add(CALLER, "a", new_version("word " * 300))
    _, editor = gateway(a=1, window=256)
    with pytest.raises(ProfileUnusable):
        editor.activate(CALLER, "a", 2)
    with pytest.raises(ProfileUnusable):
        editor.add(CALLER, "a", new_version("word " * 300))
    assert editor.activate(CALLER, "a", 1).previous_version == 2


def test_few_wait_to_be_tried(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes when many wait is told to come back; nothing was done of it."""
    monkeypatch.setattr(trial, "MAX_TRYING", 1)
    profiles, editor = gateway(a=1)
    begun, go = threading.Event(), threading.Event()
    layout = profiles.prefixes.usable_layout

    def slow(profile: Profile) -> PromptLayout:
        begun.set()
        assert go.wait(60)
        return layout(profile)

    monkeypatch.setattr(profiles.prefixes, "usable_layout", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(editor.add, CALLER, "a", new_version())
        assert begun.wait(60)
        try:
            with pytest.raises(ServiceUnavailable):
                editor.add(CALLER, "a", new_version())
            with pytest.raises(ServiceUnavailable):
                editor.activate(CALLER, "a", 1)
        finally:
            go.set()
        assert first.result() == 2
    assert editor.activate(CALLER, "a", 1).previous_version == 2
    assert editor.add(CALLER, "a", new_version()) == 3


def test_the_master_key_is_gone(gateway: Gateway) -> None:
    """An error that says where to look, and that a request's refusal can carry."""
    _, editor = gateway(a=1)
    editor.add(CALLER, "a", new_version())
    profiles, editor = gateway(keys=KeyWrapper((b"x" * 32,)), a=1)
    with pytest.raises(GatewayError, match="master key"):
        profiles.get("acme", "a", REQUEST)
    with pytest.raises(GatewayError, match="master key"):
        editor.activate(CALLER, "a", 2)
    assert editor.activate(CALLER, "a", 1).previous_version == 2


def test_a_file_with_too_large_a_version(gateway: Gateway) -> None:
    """The start stops: no table could hold the versions that come after it."""
    with pytest.raises(ProfileError, match="at most"):
        gateway(a=2**31 - 2)


def test_files_that_extend_files() -> None:
    """What they inherit is resolved among them; what cannot be stops the start, with the file's agent."""

    def file(agent: str, extends: str | None, kind: TextKind = "role", version: int = 1) -> Profile:
        segments = (Segment(kind=kind, text=f"{agent}."),)
        return Profile(agent=agent, version=version, extends=extends, segments=segments)

    def resolved(*files: Profile) -> dict[str, Inherited]:
        return shipped_inheritance({one.agent: one for one in files})

    found = resolved(file("c", "b", "tools"), file("b", "a", version=2), file("a", None, "agent_base_profile", 3))
    assert found["c"].pins == (("b", 2), ("a", 3))
    assert [segment.text for segment in found["c"].before(file("c", "b", "tools")).segments] == ["a.", "b.", "c."]
    assert found["a"] == Inherited()
    for files, told in (
        ((file("a", "nobody"),), "a: no file defines 'nobody'"),
        ((file("a", "b"), file("b", "a")), "would extend itself"),
        ((file("a", "b", "agent_base_profile"), file("b", None, "tools")), "not in the order"),
    ):
        with pytest.raises(ProfileError, match=told):
            resolved(*files)


def test_when_files_were_changed(tmp_path: Path) -> None:
    """The newest counts; a folder without any has a time all the same."""
    assert last_changed(tmp_path).year == 1970
    for name, seconds in (("a.yaml", 1_000_000_000), ("b.yaml", 1_500_000_000), ("c.txt", 1_700_000_000)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    assert last_changed(tmp_path) == datetime.fromtimestamp(1_500_000_000, UTC)
