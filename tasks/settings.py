"""All configuration, and the only module that reads the environment.

Values come from, strongest first: `REDIS_URL`, `DATABASE_URL` and `METAQORE_URL`; variables named `METAQORE_GROUP__KEY`;
`gateway.json` in the working directory (or the file `METAQORE_CONFIG` names); the defaults below. An unknown key
or a bad value raises ConfigurationError, which stops the start.

Secrets are files in `secrets.directory`, or variables named `METAQORE_SECRETS__NAME`. Each holds keys of 32 bytes
in hexadecimal, one a line: the first is used for everything new, the others are still accepted, which is how a key
is rotated.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from tasks.errors import ConfigurationError
from tasks.queueing.address import parse
from tasks.queueing.pull import Strategy

PREFIX = "METAQORE_"
CONFIG_VARIABLE = "METAQORE_CONFIG"
URL_VARIABLE = "METAQORE_URL"
KEY_BYTES = 32

#: Where downloads and converted models are kept: outside the source tree, shared by all checkouts of one user.
CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metaqore-gateway"
DEFAULT_MODEL = CACHE_HOME / "models" / "SmolLM2-135M-Instruct"

ExpandedPath = Annotated[Path, AfterValidator(Path.expanduser)]


class Group(BaseModel):
    """Base of the setting groups: unknown keys are errors, values do not change after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GatewayGroup(Group):
    """The HTTP front end and the queue it publishes to."""

    host: str = "0.0.0.0"  # noqa: S104  the blueprint's default; bin/run overrides it to loopback
    port: int = Field(default=8080, ge=1, le=65535)
    request_queue_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        repr=False,
        description="redis://, rediss:// (TLS: ?ssl_ca_certs=, ssl_certfile=, ssl_keyfile=) or"
        " sentinel://HOST:26379;sentinel://HOST:26379/0?master_name=NAME.",
    )
    key_prefix: str = Field(default="metaqore:", max_length=64, description="Before every Redis key.")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    threads: int = Field(default=1200, ge=1, le=8192, description="Requests one web process handles at once.")
    redis_connections: int = Field(default=16, ge=2, description="Connections to Redis of one web process, at most.")
    redis_timeout_s: float = Field(default=15.0, gt=0, description="Socket timeout of one Redis command.")

    @field_validator("request_queue_url")
    @classmethod
    def _is_redis(cls, value: str) -> str:
        parse(value)
        return value


class TiersGroup(Group):
    """Where a worker keeps KV blocks that its GPU has no room for."""

    ram_gib: float = Field(
        default=0.0,
        ge=0,
        description="Host RAM of each worker for KV blocks, in GiB; 0: none. See [tiers.md](tiers.md).",
    )
    disk_gib: float = Field(
        default=0.0, ge=0, description="Disk of each worker for KV blocks, in GiB; 0: none. Needs `ram_gib`."
    )
    disk_directory: ExpandedPath = Field(
        default=Path("var/kv"), description="A folder on a local disk, the same after a restart."
    )

    @model_validator(mode="after")
    def _disk_has_ram_above(self) -> TiersGroup:
        if self.disk_gib and not self.ram_gib:
            raise ValueError("disk_gib needs ram_gib: what is on disk comes back through host RAM")
        return self


class CachingGroup(Group):
    """What is cached, and for how long the cache index believes it."""

    kv_cache_enabled: bool = True
    static_prefix_caching: bool = True
    radix_tree_ttl_seconds: int = Field(default=3600, ge=1)

    tiers: TiersGroup = TiersGroup()

    @property
    def keeps_prefixes(self) -> bool:
        """Tell whether what was computed of a profile serves the next request."""
        return self.kv_cache_enabled and self.static_prefix_caching

    @model_validator(mode="after")
    def _tiers_have_a_cache_above(self) -> CachingGroup:
        if self.tiers.ram_gib and not self.keeps_prefixes:
            raise ValueError("tiers need kv_cache_enabled and static_prefix_caching")
        return self


class SchedulingGroup(Group):
    """Which request runs next, and how much at once."""

    strategy: Strategy = Field(
        default="cache_aware_continuous", description="Which waiting request a worker takes, and which worker takes it."
    )
    max_batch_tokens: int = Field(
        default=8192, ge=32, description="Tokens the engine computes in one step, and that a worker takes on."
    )
    max_attempts: int = Field(default=3, ge=1, description="Starts of one request before it is dead.")
    retry_first_s: float = Field(default=1.0, ge=0, description="Longest wait before the second attempt; then doubled.")
    retry_max_s: float = Field(default=60.0, ge=0, description="Longest wait before any attempt.")
    max_publications: int = Field(
        default=20, ge=1, description="Times a request is put into the queue, after each loss anew, before it is dead."
    )
    max_waiting: int = Field(default=100_000, ge=0, description="Requests that may wait in the queue; 0: any number.")
    max_waiting_tokens: int = Field(
        default=50_000_000, ge=0, description="Prompt tokens that may wait in the queue; 0: any number."
    )
    max_waiting_per_organization: int = Field(
        default=0, ge=0, description="Requests of one organization that may wait; 0: as many as of all."
    )
    max_waiting_tokens_per_organization: int = Field(
        default=0, ge=0, description="Prompt tokens of one organization that may wait; 0: as many as of all."
    )
    lease_s: float = Field(default=60.0, ge=1, description="A worker silent for this long loses its requests.")
    drain_s: float = Field(
        default=20.0, ge=0, description="Time a stopping worker gives what it runs; the rest is handed back."
    )


class DatabaseGroup(Group):
    """Where requests and audit events are kept: sqlite:/// for one host, postgresql:// for a fleet."""

    url: str = Field(default="sqlite:///var/gateway.db", repr=False)
    pool_size: int = Field(default=8, ge=1, description="Connections for reading; writing has one of its own.")
    group_commit_max: int = Field(default=200, ge=1, description="Requests that may share one commit.")
    timeout_s: float = Field(default=5.0, gt=0, description="Longest wait for a connection, a lock or a statement.")

    @field_validator("url")
    @classmethod
    def _has_a_driver(cls, value: str) -> str:
        scheme, _, rest = value.partition("://")
        if scheme in ("postgres", "postgresql"):
            return f"postgresql+psycopg://{rest}"
        if scheme not in ("sqlite", "postgresql+psycopg"):
            raise ValueError("must start with sqlite:/// or postgresql://")
        return value


class EngineGroup(Group):
    """The model a GPU worker serves. The gateway reads the same model's tokenizer and chat template."""

    kind: Literal["vllm", "simulated"] = "vllm"
    model: str = Field(default=str(DEFAULT_MODEL), description="A checkpoint folder, or a name on the model hub.")
    served_model_name: str | None = Field(default=None, description="Name shown to clients; default: the last part.")
    revision: str | None = Field(default=None, description="Hub revision; pin it so that the cache keeps its worth.")
    max_model_len: int | None = Field(
        default=None, ge=32, description="Context window in tokens; default: the model's."
    )
    max_num_seqs: int = Field(default=16, ge=1, description="Requests one worker runs at once.")
    dtype: str = "auto"
    kv_cache_gib: float | None = Field(default=None, gt=0, description="KV cache size on CPU, in GiB.")
    tool_parser: str | None = Field(
        default=None, description="vLLM's parser for this model's tool calls, such as hermes or llama3_json."
    )
    stall_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds without a step, while requests run, after which the engine is taken for hung, and the worker "
        "replaced; default: 8, or 120 where vLLM computes on plain processors.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of vLLM's AsyncEngineArgs, or of the simulated engine."
    )

    @property
    def model_name(self) -> str:
        """Return the name clients see."""
        return self.served_model_name or Path(self.model).name

    @property
    def model_source(self) -> str:
        """Return the checkpoint's folder with ~ expanded, or the hub name as given."""
        return str(Path(self.model).expanduser()) if self.model.startswith(("~", "/", ".")) else self.model


class GovernanceGroup(Group):
    """Which policy decides where an organization has set none, and where agent profiles are read from."""

    policy: str = Field(default="default_local_first", description="Policy of organizations that name no other.")
    detection: Literal["off", "record", "raise", "refuse"] = Field(
        default="record", description="What such organizations do about private or sensitive data found in a request."
    )
    providers: tuple[Literal["hmcp_gateway", "ollama", "openrouter"], ...] = Field(
        default=("hmcp_gateway",),
        description="Providers that are up. This release runs requests on `hmcp_gateway` only.",
    )
    profiles_directory: ExpandedPath = Path("profiles")


class MetaqoreGroup(Group):
    """The MetaQore server that is asked how a request's project stands; without `url` none is."""

    url: str | None = Field(
        default=None, repr=False, description="Such as http://127.0.0.1:8001; `METAQORE_URL` sets it too."
    )
    mode: Literal["strict", "adaptive", "playground"] | None = Field(
        default=None, description="Governance mode to apply; default: the server's own."
    )
    timeout_s: float = Field(default=2.0, gt=0, le=60, description="Longest wait of one request, all told.")
    cache_s: float = Field(default=5.0, ge=0, le=300, description="How long an answer about a project is used.")
    failure_cache_s: float = Field(default=1.0, ge=0, le=60, description="How long a failure to get one is.")
    cache_projects: int = Field(default=10_000, ge=1, description="Projects whose answers are kept, at most.")
    remember_mode_s: float = Field(
        default=300.0, ge=0, description="How long the server's last known mode holds while it cannot say; then strict."
    )
    breaker_failures: int = Field(default=5, ge=1, description="Failures in a row after which it is left alone.")
    breaker_open_s: float = Field(default=10.0, gt=0, description="For how long; then one request tries again.")
    patience_s: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        description="How long a queued request waits for MetaQore to answer; 0: not at all.",
    )
    connections: int = Field(default=16, ge=1, description="Connections of one process, at most.")
    max_answer_bytes: int = Field(default=4 * 2**20, ge=1024, description="A longer answer is a bad answer.")

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if not value:
            return None
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError("must be http:// or https:// and a host, in ASCII")
        if parts.username is not None or parts.password is not None:
            raise ValueError("must hold no password; the key goes into the secret metaqore_api_key")
        if parts.query or parts.fragment:
            raise ValueError("must hold no query and no fragment")
        return value.rstrip("/")


class ProfilesGroup(Group):
    """What an organization may make of its agents; that a profile fits the model's context window is always asked."""

    max_agents: int = Field(default=1000, ge=1, description="Agents that an organization may make or change.")
    max_versions: int = Field(default=1000, ge=1, description="Own versions of one agent.")
    max_segments: int = Field(default=64, ge=1, description="Segments of one version, without what it inherits.")
    max_text_bytes: int = Field(default=256 * 2**10, ge=1, description="Their text together, in UTF-8.")
    max_depth: int = Field(
        default=4, ge=0, description="Bases that may stand above one another; 0: none may be extended."
    )
    admins_only: bool = Field(default=False, description="Only admin keys may change what requests get; all may draft.")
    warm_copies: int = Field(
        default=1, ge=0, le=64, description="Workers that compute a version before requests get it; 0: none does."
    )
    warm_s: float = Field(
        default=30.0, ge=0, le=600, description="Longest wait for that; then requests get it all the same."
    )
    max_pinned: int = Field(default=20, ge=0, description="Agents of one organization that may be pinned.")


class StreamingGroup(Group):
    """How answers travel from worker to client."""

    join_ms: float = Field(default=15.0, ge=0, le=1000, description="Tokens that come this close travel as one frame.")
    retention_s: int = Field(default=3600, ge=60, description="How long Redis keeps a stream; later reads use SQL.")
    heartbeat_s: float = Field(default=15.0, gt=0, description="Silence after which an SSE comment is sent.")
    join_max_ms: float = Field(
        default=120.0, ge=0, le=5000, description="The same for a worker with a thousand streams; in between for fewer."
    )
    buffer_frames: int = Field(default=256, ge=8, description="Frames held for a slow reader before it re-reads Redis.")
    max_sockets: int = Field(default=512, ge=1, description="WebSockets one web process holds; each has a thread.")
    allowed_origins: tuple[str, ...] = Field(
        default=(), description="Origins other than the gateway's own whose pages may open a WebSocket."
    )
    socket_send_timeout_s: float = Field(default=10.0, gt=0, description="A WebSocket that takes nothing is cut off.")
    ping_interval_s: float = Field(default=20.0, gt=0, description="How often a silent WebSocket is pinged.")


class AuditGroup(Group):
    """The record as others read it: exports, and followers that keep MetaQore's file."""

    follow_interval_s: float = Field(
        default=1.0, gt=0, le=3600, description="How often a follower looks for new events, once it has all there are."
    )
    max_exports: int = Field(default=8, ge=1, description="Exports over HTTP that one web process runs at once.")


class LogsGroup(Group):
    """What the processes say, one event a line. See [logs.md](logs.md)."""

    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`console` is text for a person; `auto`: on a terminal `console`, elsewhere `json`."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="The least that is shown. Celery's `--loglevel` and gunicorn's `--log-level` go first.",
    )
    access: bool = Field(default=True, description="A line for each HTTP request, on standard output.")
    core_dumps: bool = Field(
        default=False, description="Let the kernel write core dumps, in which prompts are, of processes that crash."
    )


class FlowerGroup(Group):
    """Celery's dashboard. See [flower.md](flower.md)."""

    events: bool = Field(
        default=False, description="Workers tell of every task as it happens, and Flower has them do so."
    )


class MetricsGroup(Group):
    """Where Prometheus finds the metrics. See [metrics.md](metrics.md)."""

    gateway_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="A port of their own for a gateway's; default: /metrics on the gateway's port. 0: nowhere.",
    )
    worker_port: int = Field(
        default=9470,
        ge=0,
        le=65535,
        description="A worker's; where it is taken, the first free of the next nine. 0: none.",
    )
    housekeeper_port: int = Field(default=9480, ge=0, le=65535, description="The same for a housekeeper.")
    host: str = Field(default="127.0.0.1", description="The address that these ports are on.")


class FilesGroup(Group):
    """Files that clients upload for batches."""

    max_bytes: int = Field(default=200 * 2**20, ge=1024)


class SecretsGroup(Group):
    """Keys, from the environment or from files."""

    directory: ExpandedPath = Path("var/secrets")
    master_key: SecretStr | None = None
    signing_key: SecretStr | None = None
    organization_salt: SecretStr | None = None
    key_pepper: SecretStr | None = None
    metaqore_api_key: SecretStr | None = Field(
        default=None, description="The MetaQore server's API key, as it is: one line, no hexadecimal."
    )

    flower_password: SecretStr | None = Field(
        default=None, description="What Flower asks for, of the user `flower`: one line, as it is."
    )

    def keys(self, name: str) -> tuple[bytes, ...]:
        """Return the keys of secret `name`, newest first, each of 32 bytes.

        Raises ConfigurationError if the secret is missing or malformed; the message never shows its value.
        """
        text, where = self._text(name)
        if text is None:
            raise ConfigurationError(
                f"secret {name} is missing: {where} does not exist. `flask secrets create` makes it."
            )
        try:
            keys = tuple(bytes.fromhex(line) for line in text.split())
        except ValueError:
            keys = ()
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ConfigurationError(f"{where} must hold {KEY_BYTES}-byte keys in hexadecimal, one a line")
        return keys

    def metaqore_key(self) -> str | None:
        """Return the API key for MetaQore, or None if there is neither variable nor file: not every server wants one.

        Raises ConfigurationError if it cannot be read or could not be sent in a header; the message never shows it.
        """
        text, where = self._text("metaqore_api_key")
        if text is None:
            return None
        key = text.strip()
        if not key or not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigurationError(f"{where} must hold one API key: printable ASCII without spaces")
        return key

    def flower_password_text(self) -> str | None:
        """Return what Flower asks for, or None if there is neither variable nor file, or nothing in it."""
        text, _ = self._text("flower_password")
        return (text or "").strip() or None

    def _text(self, name: str) -> tuple[str | None, str]:
        """Return what secret `name` holds, None if there is neither variable nor file, and where that is or would be."""
        given: SecretStr | None = getattr(self, name)
        if given is not None:
            return given.get_secret_value(), f"{PREFIX}SECRETS__{name.upper()}"
        path = self.directory / name
        try:
            return path.read_text("ascii"), str(path)
        except FileNotFoundError:
            return None, str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"secret {name} cannot be read from {path}: {error.__class__.__name__}") from None


class TracingGroup(Group):
    """Traces of requests. What is sent, and where, is said by OpenTelemetry's own variables."""

    enabled: bool | None = Field(
        default=None, description="Record them; default: if OTEL_TRACES_EXPORTER or an OTLP endpoint is set."
    )
    accept_context: bool = Field(
        default=True,
        description="Go on with the trace that a client names in traceparent, as sampled or not as it says.",
    )
    flush_s: float = Field(default=3.0, ge=0, description="What a process that ends takes at most to send the last.")

    @property
    def exporters(self) -> tuple[str, ...]:
        """Return which exporters are to be used, as plug-ins are named; none if nothing is to be recorded."""
        chosen = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
        endpoint = any(os.environ.get(f"OTEL_EXPORTER_OTLP_{part}ENDPOINT") for part in ("", "TRACES_"))
        wanted = bool(chosen) or endpoint if self.enabled is None else self.enabled
        if not wanted or chosen == "none" or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return ()
        protocols = [os.environ.get(f"OTEL_EXPORTER_OTLP_{part}PROTOCOL") for part in ("TRACES_", "")]
        grpc = next(filter(None, protocols), "http/protobuf") == "grpc"
        otlp = "otlp_proto_grpc" if grpc else "otlp_proto_http"
        names = [name.strip() for name in (chosen or "otlp").split(",")]
        return tuple(otlp if name == "otlp" else name for name in names if name)


SECRET_NAMES = ("master_key", "signing_key", "organization_salt", "key_pepper")


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


def _config_file() -> Path:
    return Path(os.environ.get(CONFIG_VARIABLE, "gateway.json")).expanduser()


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
    path = _config_file()
    if CONFIG_VARIABLE not in os.environ and not path.exists():
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
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name not in (CONFIG_VARIABLE, URL_VARIABLE, *known):
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
    short: dict[str, Any] = {}
    if url := os.environ.get("REDIS_URL"):
        short["gateway"] = {"request_queue_url": url}
    if url := os.environ.get("DATABASE_URL"):
        short["database"] = {"url": url}
    if url := os.environ.get(URL_VARIABLE):
        short["metaqore"] = {"url": url}
    try:
        return Settings(**short)
    except ValidationError as error:
        # Values stay out of the message: they may be passwords in URLs.
        problems = "; ".join(_problem(item) for item in error.errors(include_input=False, include_url=False))
        raise ConfigurationError(f"bad configuration ({_config_file()} or environment): {problems}") from None
    except SettingsError as error:
        raise ConfigurationError(f"bad configuration in the environment: {error}") from None


@functools.cache
def settings() -> Settings:
    """Return this process's configuration, read once."""
    return load()
