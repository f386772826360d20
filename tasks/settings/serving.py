"""Settings of serving: how requests are taken in, queued and computed, and how their answers travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tasks.queueing.address import parse
from tasks.queueing.pull import Strategy
from tasks.settings.environment import CACHE_HOME
from tasks.settings.group import ExpandedPath, Group

DEFAULT_MODEL = CACHE_HOME / "models" / "SmolLM2-135M-Instruct"


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


class FilesGroup(Group):
    """Files that clients upload for batches."""

    max_bytes: int = Field(default=200 * 2**20, ge=1024)
