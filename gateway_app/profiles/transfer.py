"""Profiles as YAML: one document an agent's version, in the format of the files that are shipped.

What is exported reads back the same to the letter. What is imported becomes a draft: a new agent, or the next version
of one that there is; the same text as the newest version adds nothing. A dry run tells what would come of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gateway_app.profiles.changes import Expectation, ProfileChanges
from gateway_app.profiles.comparison import Comparison, compare
from gateway_app.profiles.drafts import ProfileFile
from gateway_app.profiles.inheritance import check_base
from gateway_app.profiles.sealing import Why
from gateway_app.profiles.store import ProfileStore
from tasks.errors import InvalidRequest, InvalidYaml, ProfileExists
from tasks.prompts.profile import Profile
from tasks.prompts.profile_yaml import BadYaml, dump, load
from tasks.settings import ProfilesGroup

MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of a file, or would. `newest` is the version it was compared with; `version` is None if none was added.

    `from_version` is the number in the file: where its text came from.
    """

    agent: str
    action: Literal["created", "added", "unchanged"]
    from_version: int
    newest: int | None
    version: int | None
    comparison: Comparison | None


class Transfer:
    """Writes and reads profiles, over what an organization has in `store` and the shipped files."""

    def __init__(
        self, store: ProfileStore, shipped: Mapping[str, Profile], changes: ProfileChanges, limits: ProfilesGroup
    ) -> None:
        self._store = store
        self._shipped = shipped
        self._changes = changes
        self._limits = limits

    def active(self, organization: str) -> Iterator[Profile]:
        """Yield the active version of every agent that has one, with its own text, in order of names."""
        own: dict[str, int | None] = {}
        after = ""
        while page := self._store.agents(organization, after, 100):
            after = page[-1][0].agent_name
            own |= {agent.agent_name: agent.active_version for agent, _ in page}
            own |= {agent.agent_name: 0 for agent, _ in page if agent.retired_at is not None}
        for name in sorted(own.keys() | self._shipped.keys()):
            version = own.get(name)
            if version is None and name in self._shipped:
                yield self._shipped[name]
            elif version and (stored := self._store.find(organization, name, version)) is not None:
                yield stored.profile

    def read(self, content: bytes) -> ProfileFile:
        """Return the profile in `content`. Raises InvalidYaml, or InvalidRequest with what is wrong with each field."""
        try:
            file = ProfileFile.model_validate(load(content))
        except BadYaml as error:
            raise InvalidYaml(f"the YAML cannot be read: {error}") from None
        except ValidationError as error:
            items = error.errors(include_url=False, include_context=False, include_input=False)
            raise InvalidRequest("the profile is not valid", errors=[*map(_problem, items[:MAX_PROBLEMS])]) from None
        file.check(self._limits)
        return file

    def take(
        self, organization: str, why: Why, file: ProfileFile, *, dry_run: bool, coming: Collection[str] = ()
    ) -> Imported:
        """Import a profile as a draft, or tell what that would do; `coming` are agents that it may extend by then.

        Raises ProfileLimit, ProfileExists or VersionConflict if somebody else was faster, BaseUnusable if it extends
        what is not there.
        """
        newest = self._newest(organization, file.agent)
        bases = {*self._shipped, *coming}
        if newest is None:
            check_base(organization, file.agent, file.extends, bases, self._store)
            if not dry_run:
                self._changes.create(organization, why, file.profile(file.agent, 1), None)
            return Imported(file.agent, "created", file.version, None, None if dry_run else 1, None)
        found = compare(newest, file.profile(file.agent, newest.version))
        if _same(newest, file):
            return Imported(file.agent, "unchanged", file.version, newest.version, None, found)
        check_base(organization, file.agent, file.extends, bases, self._store)
        version = None
        if not dry_run:
            shipped = self._shipped[file.agent].version if file.agent in self._shipped else 0
            profile = file.profile(file.agent, newest.version)
            version = self._changes.add(organization, why, profile, Expectation(newest.version), None, shipped)
        return Imported(file.agent, "added", file.version, newest.version, version, found)

    def _newest(self, organization: str, agent: str) -> Profile | None:
        row, shipped = self._store.agent(organization, agent), self._shipped.get(agent)
        if row is not None and row.newest_version >= (shipped.version if shipped else 1):
            stored = self._store.find(organization, agent, row.newest_version)
            if stored is not None:
                return stored.profile
        if row is not None and shipped is None:
            # Made in this moment; its first version is not there yet.
            raise ProfileExists
        return shipped


def export(profile: Profile) -> str:
    """Return a version's own text as YAML."""
    document: dict[str, Any] = {"agent": profile.agent, "version": profile.version}
    if profile.description:
        document["description"] = profile.description
    if profile.extends is not None:
        document["extends"] = profile.extends
    if profile.abstract:
        document["abstract"] = True
    return dump({**document, "segments": [segment.model_dump(mode="json") for segment in profile.segments]})


def _problem(item: ErrorDetails) -> dict[str, str]:
    unknown = item["type"] == "extra_forbidden"
    # Where a text is indented wrongly, its lines are taken for fields: so those are not named.
    place = item["loc"][:-1] if unknown else item["loc"]
    message = "holds a field that is not known here" if unknown else item["msg"]
    return {"field": ".".join(map(str, place)) or "body", "message": message}


def _same(profile: Profile, file: ProfileFile) -> bool:
    names = ("description", "extends", "abstract", "segments")
    return all(getattr(profile, name) == getattr(file, name) for name in names)
