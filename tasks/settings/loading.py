"""The whole configuration, read from its sources and validated: what is wrong is told by name."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from tasks.errors import ConfigurationError
from tasks.settings.environment import (
    CONFIG_VARIABLE,
    PREFIX,
    URL_VARIABLE,
    config_file,
    config_file_is_named,
    own_variables,
    short_urls,
)
from tasks.settings.governance import AuditGroup, GovernanceGroup, MetaqoreGroup, ProfilesGroup
from tasks.settings.group import Group
from tasks.settings.observability import FlowerGroup, LogsGroup, MetricsGroup, TracingGroup
from tasks.settings.secrets import SecretsGroup
from tasks.settings.serving import (
    CachingGroup,
    DatabaseGroup,
    EngineGroup,
    FilesGroup,
    GatewayGroup,
    SchedulingGroup,
    StreamingGroup,
)


class Settings(BaseSettings):
    """The whole configuration, validated."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    gateway: GatewayGroup = GatewayGroup()
    caching: CachingGroup = CachingGroup()
    scheduling: SchedulingGroup = SchedulingGroup()
    database: DatabaseGroup = DatabaseGroup()
    engine: EngineGroup = EngineGroup()
    governance: GovernanceGroup = GovernanceGroup()
    metaqore: MetaqoreGroup = MetaqoreGroup()
    profiles: ProfilesGroup = ProfilesGroup()
    streaming: StreamingGroup = StreamingGroup()
    audit: AuditGroup = AuditGroup()
    files: FilesGroup = FilesGroup()
    tracing: TracingGroup = TracingGroup()
    logs: LogsGroup = LogsGroup()
    metrics: MetricsGroup = MetricsGroup()
    flower: FlowerGroup = FlowerGroup()
    secrets: SecretsGroup = SecretsGroup()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  pydantic passes all four by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: the short URLs, the environment, the file."""
        return (init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=_read_file()))


def _known_keys() -> dict[str, tuple[str, ...]]:
    """Return the keys of each group; those of a group inside it have its name before them, and a point."""
    groups = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {
        name: tuple(_keys(group))
        for name, group in groups.items()
        if isinstance(group, type) and issubclass(group, Group)
    }


def _keys(group: type[Group]) -> Iterator[str]:
    for name, field in group.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            yield from (f"{name}.{key}" for key in _keys(field.annotation))


def _read_file() -> dict[str, dict[str, Any]]:
    """Return the groups of the configuration file. Raises ConfigurationError, naming what is wrong with it."""
    path = config_file()
    if not config_file_is_named() and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ConfigurationError(f"{CONFIG_VARIABLE} names {path}, which does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a JSON object of setting groups")
    for group, values in content.items():
        # Merging would drop a group of another kind without a word where the environment gives a key of it.
        if group in Settings.model_fields and not isinstance(values, dict):
            raise ConfigurationError(f"{path}: {group} must be a JSON object")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"{', '.join(sorted(repeated))} given more than once")
    return dict(pairs)


def _problem(item: ErrorDetails) -> str:
    name = ".".join(map(str, item["loc"])) or "settings"
    if item["type"] != "extra_forbidden":
        return f"{name}: {item['msg']}"
    known = [*Settings.model_fields, *(f"{group}.{key}" for group, keys in _known_keys().items() for key in keys)]
    return f"{name}: no such setting{_suggestion(name, known)}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _refuse_unknown_variables() -> None:
    """Raise ConfigurationError for a METAQORE_ variable that no setting has: most are typing errors."""
    known = [
        f"{PREFIX}{group}__{key.replace('.', '__')}".upper() for group, keys in _known_keys().items() for key in keys
    ]
    for name in own_variables():
        if name not in (CONFIG_VARIABLE, URL_VARIABLE, *known):
            # What begins with the prefix resembles every short name by the prefix alone.
            short = (
                [CONFIG_VARIABLE, URL_VARIABLE] if _suggestion(name.upper()[len(PREFIX) :], ["CONFIG", "URL"]) else []
            )
            raise ConfigurationError(
                f"environment variable {name} is no setting{_suggestion(name.upper(), [*short, *known])}"
            )


def load() -> Settings:
    """Read and validate the configuration. Raises ConfigurationError, naming each bad key."""
    _refuse_unknown_variables()
    try:
        return Settings(**short_urls())
    except ValidationError as error:
        # Values stay out of the message: they may be passwords in URLs.
        problems = "; ".join(_problem(item) for item in error.errors(include_input=False, include_url=False))
        raise ConfigurationError(f"bad configuration ({config_file()} or environment): {problems}") from None
    except SettingsError as error:
        raise ConfigurationError(f"bad configuration in the environment: {error}") from None


@functools.cache
def settings() -> Settings:
    """Return this process's configuration, read once."""
    return load()
