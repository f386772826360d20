"""A wrong setting must stop the start with a message that helps, and no message may show a value.

Secrets are in `test_secrets.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.errors import ConfigurationError
from tasks.settings import CONFIG_VARIABLE, TiersGroup, load, settings

ROOT = Path(__file__).resolve().parents[2]
#: A password that must never be shown, in messages or elsewhere.
PASSWORD = "hunter2"

WriteFile = Callable[[Any], None]


@pytest.fixture
def write_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Return a function that writes the configuration file: text or bytes as they are, anything else as JSON."""
    path = tmp_path / "gateway.json"
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))

    def write(content: Any) -> None:
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    write({})
    return write


def message() -> str:
    """Return what a user reads when the configuration does not load."""
    with pytest.raises(ConfigurationError) as caught:
        load()
    assert caught.value.__cause__ is None, "a chained error would print the values it saw"
    return caught.value.detail


# --- Where values come from ---------------------------------------------------------------------------


def test_defaults_are_the_blueprints() -> None:
    """Without any configuration the blueprint's values hold."""
    loaded = load()
    assert (loaded.gateway.host, loaded.gateway.port) == ("0.0.0.0", 8080)
    assert loaded.gateway.request_queue_url == "redis://127.0.0.1:6379/0"
    assert loaded.caching.kv_cache_enabled
    assert loaded.caching.static_prefix_caching
    assert loaded.caching.radix_tree_ttl_seconds == 3600
    assert loaded.scheduling.strategy == "cache_aware_continuous"
    assert loaded.scheduling.max_batch_tokens == 8192
    assert loaded.database.url == "sqlite:///var/gateway.db"
    assert loaded.engine.kind == "vllm"


def test_our_gateway_json_holds_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that comes with the code documents the defaults, so it may not differ from them."""
    defaults = load()
    monkeypatch.setenv(CONFIG_VARIABLE, str(ROOT / "gateway.json"))
    assert load() == defaults


def test_file_is_read_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without METAQORE_CONFIG it is gateway.json where the process runs, and it may be missing."""
    monkeypatch.delenv(CONFIG_VARIABLE)
    monkeypatch.chdir(tmp_path)
    assert load().gateway.port == 8080
    (tmp_path / "gateway.json").write_text('{"gateway": {"port": 9001}}', encoding="utf-8")
    assert load().gateway.port == 9001


def test_precedence(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strongest first: the short URL, the environment, the file, the default."""
    assert load().gateway.request_queue_url == "redis://127.0.0.1:6379/0"
    write_file({"gateway": {"request_queue_url": "redis://file/0"}})
    assert load().gateway.request_queue_url == "redis://file/0"
    monkeypatch.setenv("METAQORE_GATEWAY__REQUEST_QUEUE_URL", "redis://environment/0")
    assert load().gateway.request_queue_url == "redis://environment/0"
    monkeypatch.setenv("REDIS_URL", "rediss://short/0")
    assert load().gateway.request_queue_url == "rediss://short/0"


def test_sources_are_merged_key_by_key(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stronger source replaces the keys it gives, not the group they are in."""
    write_file({"gateway": {"host": "file", "port": 9001}})
    monkeypatch.setenv("METAQORE_GATEWAY__PORT", "9002")
    monkeypatch.setenv("REDIS_URL", "redis://short/0")
    gateway = load().gateway
    assert (gateway.host, gateway.port, gateway.request_queue_url) == ("file", 9002, "redis://short/0")
    assert gateway.threads == 1200


def test_every_setting_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key has its METAQORE_GROUP__KEY, and its default can be written there."""
    defaults = load()
    for group, keys in defaults.model_dump().items():
        for key, value in keys.items():
            if value is not None:
                text = json.dumps(value, default=str) if isinstance(value, bool | dict | tuple) else str(value)
                monkeypatch.setenv(f"METAQORE_{group}__{key}".upper(), text)
    assert load() == defaults


def test_engine_options_are_json(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further engine arguments are an object, in the environment as JSON."""
    write_file({"engine": {"options": {"enforce_eager": True, "block_size": 32}}})
    monkeypatch.setenv("METAQORE_ENGINE__OPTIONS", '{"block_size": 64}')
    assert load().engine.options == {"enforce_eager": True, "block_size": 64}


def test_a_group_inside_a_group(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys come from the file and, one by one, from the environment; a typing error is told as for any other."""
    write_file({"caching": {"tiers": {"ram_gib": 16, "disk_gib": 100}}})
    monkeypatch.setenv("METAQORE_CACHING__TIERS__DISK_DIRECTORY", "/kv")
    assert load().caching.tiers == TiersGroup(ram_gib=16, disk_gib=100, disk_directory=Path("/kv"))
    monkeypatch.setenv("METAQORE_CACHING__TIERS__RAM_GIP", "1")
    with pytest.raises(ConfigurationError, match="did you mean METAQORE_CACHING__TIERS__RAM_GIB"):
        load()


@pytest.mark.parametrize(
    ("caching", "what"),
    [
        ({"tiers": {"disk_gib": 100}}, "disk_gib needs ram_gib"),
        ({"tiers": {"ram_gib": 16}, "static_prefix_caching": False}, "tiers need kv_cache_enabled"),
        ({"tiers": {"ram_gip": 16}}, r"did you mean caching\.tiers\.ram_gib"),
    ],
)
def test_tiers_that_cannot_work(write_file: WriteFile, caching: dict[str, Any], what: str) -> None:
    """They stop the start."""
    write_file({"caching": caching})
    with pytest.raises(ConfigurationError, match=what):
        load()


def test_settings_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process keeps the configuration it started with, and nobody can change it."""
    first = settings()
    monkeypatch.setenv("METAQORE_GATEWAY__PORT", "9001")
    assert settings() is first
    with pytest.raises(ValidationError, match="frozen"):
        first.gateway.port = 1


# --- Unknown keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"gateway": {"prot": 9001}}, "gateway.prot"),
        ({"gatway": {"port": 9001}}, "gatway"),
        ({"port": 9001}, "port"),
    ],
)
def test_unknown_key_in_the_file(write_file: WriteFile, tmp_path: Path, content: object, named: str) -> None:
    """The message names the key and the file."""
    write_file(content)
    told = message()
    assert f"{named}: no such setting" in told
    assert str(tmp_path / "gateway.json") in told


def test_unknown_key_in_the_file_comes_with_a_suggestion(write_file: WriteFile) -> None:
    """Most unknown keys are typing errors, in the file as in the environment."""
    write_file({"gateway": {"prot": 9001}})
    assert "did you mean gateway.port?" in message()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("METAQORE_GATEWAY__PROT", "METAQORE_GATEWAY__PORT"),
        ("METAQORE_GATEWAY_PORT", "METAQORE_GATEWAY__PORT"),
        ("METAQORE_CACHING__RADIX_TREE_TTL", "METAQORE_CACHING__RADIX_TREE_TTL_SECONDS"),
        ("METAQORE_SECRETS__MASTERKEY", "METAQORE_SECRETS__MASTER_KEY"),
    ],
)
def test_unknown_variable(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    """A misspelt variable stops the start, with the name that was meant; its value is not shown."""
    monkeypatch.setenv(name, PASSWORD)
    told = message()
    assert name in told
    assert f"did you mean {meant}?" in told
    assert PASSWORD not in told


def test_unlikely_variable_has_no_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resembles nothing is refused without a guess."""
    monkeypatch.setenv("METAQORE_XYZZY", "1")
    assert message() == "environment variable METAQORE_XYZZY is no setting"


def test_others_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only our own prefix is checked."""
    monkeypatch.setenv("METAQOREX", "1")
    monkeypatch.setenv("GATEWAY__PROT", "1")
    load()


# --- Bad values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("gateway", "port", 0),
        ("gateway", "port", 65536),
        ("gateway", "port", PASSWORD),
        ("gateway", "request_queue_url", f"http://user:{PASSWORD}@host"),
        ("caching", "radix_tree_ttl_seconds", 0),
        ("caching", "kv_cache_enabled", "perhaps"),
        ("scheduling", "strategy", "first_come"),
        ("scheduling", "max_batch_tokens", 1),
        ("database", "url", f"mysql://user:{PASSWORD}@host/name"),
        ("database", "timeout_s", -1),
        ("engine", "kind", PASSWORD),
        ("engine", "max_model_len", "long"),
        ("metaqore", "mode", PASSWORD),
        ("metaqore", "timeout_s", 0),
        ("metaqore", "breaker_failures", 0),
        ("streaming", "join_ms", 1001),
        ("streaming", "heartbeat_s", "Infinity"),
    ],
)
def test_bad_value(
    write_file: WriteFile, monkeypatch: pytest.MonkeyPatch, group: str, key: str, value: int | str
) -> None:
    """From the file and from the environment alike: the message names the key and keeps the value to itself."""
    write_file({group: {key: value}})
    told = message()
    assert f"{group}.{key}: " in told
    assert PASSWORD not in told
    write_file({})
    monkeypatch.setenv(f"METAQORE_{group}__{key}".upper(), str(value))
    assert message() == told


def test_all_bad_values_are_named_at_once(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody should have to start the gateway once for each mistake."""
    write_file({"gateway": {"port": 0}, "caching": {"radix_tree_ttl_second": 1}})
    monkeypatch.setenv("METAQORE_STREAMING__RETENTION_S", "1")
    told = message()
    for named in ("gateway.port", "caching.radix_tree_ttl_second", "streaming.retention_s"):
        assert named in told


def test_bad_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine options that are no JSON stop the start; what they hold is not shown."""
    monkeypatch.setenv("METAQORE_ENGINE__OPTIONS", f"{{hf_token: {PASSWORD}}}")
    told = message()
    assert "engine" in told
    assert PASSWORD not in told


@pytest.mark.parametrize("content", ['{"gateway": ', b'{"a": "\xff"}', "[]x", "[1]", "null", '{"gateway": 5}'])
def test_unusable_file(write_file: WriteFile, tmp_path: Path, content: str | bytes) -> None:
    """A file that is no JSON object in UTF-8, of groups, stops the start; the message names the file."""
    write_file(content)
    assert str(tmp_path / "gateway.json") in message()


def test_named_file_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was asked for and is not there is an error, unlike a missing gateway.json."""
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "missing.json"))
    assert "missing.json, which does not exist" in message()


def test_named_file_must_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in place of the file must not silently mean defaults."""
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path))
    assert str(tmp_path) in message()


def test_bad_group_is_not_hidden_by_the_environment(write_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong in the file stays wrong when a variable overrides a part of it."""
    write_file({"gateway": 5})
    monkeypatch.setenv("METAQORE_GATEWAY__PORT", "9001")
    assert "gateway" in message()


# --- URLs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
@pytest.mark.parametrize("variable", ["DATABASE_URL", "METAQORE_DATABASE__URL"])
def test_postgres_urls_get_the_driver(monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str) -> None:
    """Hosting platforms write postgres://, SQLAlchemy wants the driver; the rest of the URL is kept as it is."""
    rest = "user:p%40ss@host:5433/name?sslmode=require"
    monkeypatch.setenv(variable, f"{scheme}://{rest}")
    assert load().database.url == f"postgresql+psycopg://{rest}"


def test_sqlite_url_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite needs no driver's name."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:////data/gateway.db")
    assert load().database.url == "sqlite:////data/gateway.db"


@pytest.mark.parametrize("name", ["REDIS_URL", "DATABASE_URL", "METAQORE_URL", "METAQORE_METAQORE__URL"])
def test_empty_short_url_counts_as_absent(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Compose files and shells often set a variable to nothing."""
    defaults = load()
    monkeypatch.setenv(name, "")
    assert load() == defaults


@pytest.mark.parametrize("variable", ["METAQORE_URL", "METAQORE_METAQORE__URL"])
@pytest.mark.parametrize(
    "url", ["http://metaqore.example:8001", "https://[::1]:8001/", "http://127.0.0.1/api/v1", "https://a.example/mq/"]
)
def test_the_url_of_metaqore(monkeypatch: pytest.MonkeyPatch, variable: str, url: str) -> None:
    """Its short name is as good as its long one, and wins over it. A slash at its end means nothing."""
    assert load().metaqore.url is None
    monkeypatch.setenv(variable, url)
    assert load().metaqore.url == url.rstrip("/")
    monkeypatch.setenv("METAQORE_URL", "http://strongest")
    assert load().metaqore.url == "http://strongest"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"http://user:{PASSWORD}@host", "must hold no password"),
        (f"http://{PASSWORD}@host", "must hold no password"),
        (f"http://host?key={PASSWORD}", "must hold no query"),
        (f"http://host#{PASSWORD}", "must hold no query"),
        (f"redis://{PASSWORD}", "must be http"),
        (PASSWORD, "must be http"),
        ("http://", "must be http"),
        ("http:///path", "must be http"),
        ("http://host:0", "must be http"),
        ("http://host:99999", "must be http"),
        ("http://[::1", "must be http"),
        ("http://host name", "must be http"),
        ("http://host\r\nX: y", "must be http"),
        ("http://höst", "must be http"),
    ],
)
def test_a_bad_url_of_metaqore(monkeypatch: pytest.MonkeyPatch, url: str, told: str) -> None:
    """It stops the start, and what was in it is not shown."""
    monkeypatch.setenv("METAQORE_URL", url)
    problem = message()
    assert "metaqore.url: " in problem
    assert told in problem
    assert PASSWORD not in problem


def test_a_misspelt_short_url_of_metaqore(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still an unknown variable."""
    monkeypatch.setenv("METAQORE_URI", "http://host")
    assert "METAQORE_URI is no setting; did you mean METAQORE_URL?" in message()


@pytest.mark.parametrize("name", ["REDIS_URL", "DATABASE_URL"])
def test_bad_short_url(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another kind of service is refused, and the password in its URL is not shown."""
    monkeypatch.setenv(name, f"amqp://user:{PASSWORD}@host")
    told = message()
    assert "must start with" in told
    assert PASSWORD not in told


def test_passwords_in_urls_are_not_in_the_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings end up in tracebacks and debug logs; passwords may not."""
    monkeypatch.setenv("DATABASE_URL", f"postgresql://user:{PASSWORD}@host/name")
    monkeypatch.setenv("REDIS_URL", f"redis://:{PASSWORD}@host/0")
    assert PASSWORD not in repr(load())


# --- Models and paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "served", "name", "source"),
    [
        ("/models/SmolLM2-135M", None, "SmolLM2-135M", "/models/SmolLM2-135M"),
        ("~/models/tiny", None, "tiny", str(Path("~/models/tiny").expanduser())),
        ("org/model", None, "model", "org/model"),
        ("org/model", "house-model", "house-model", "org/model"),
    ],
)
def test_model_name_and_source(write_file: WriteFile, model: str, served: str | None, name: str, source: str) -> None:
    """Clients see the served name or the last part; a hub's name is passed on as it is."""
    write_file({"engine": {"model": model, "served_model_name": served}})
    engine = load().engine
    assert (engine.model_name, engine.model_source) == (name, source)


def test_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths may begin with a tilde."""
    monkeypatch.setenv("METAQORE_SECRETS__DIRECTORY", "~/keys")
    monkeypatch.setenv("METAQORE_GOVERNANCE__PROFILES_DIRECTORY", "~/profiles")
    loaded = load()
    assert loaded.secrets.directory == Path("~/keys").expanduser()
    assert loaded.governance.profiles_directory == Path("~/profiles").expanduser()
