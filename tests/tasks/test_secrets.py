"""Secrets come from files or the environment, can be rotated, and are shown nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import ConfigurationError
from tasks.settings import KEY_BYTES, SECRET_NAMES, load

#: What must never be shown.
PASSWORD = "hunter2"
KEY, OLDER_KEY = "ab" * KEY_BYTES, "cd" * KEY_BYTES


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_from_a_file(secrets_directory: Path, name: str) -> None:
    """A secret is a file of its name."""
    (secrets_directory / name).write_text(f"{KEY}\n", encoding="ascii")
    assert load().secrets.keys(name) == (bytes.fromhex(KEY),)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_environment_wins_over_the_file(secrets_directory: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A variable is stronger than the file, which then need not exist."""
    (secrets_directory / name).unlink()
    monkeypatch.setenv(f"METAQORE_SECRETS__{name.upper()}", KEY)
    assert load().secrets.keys(name) == (bytes.fromhex(KEY),)


@pytest.mark.parametrize("text", ["{new}\n{old}\n", "{new}\r\n{old}", "\n{new}\n\n{old}\n\n"])
def test_rotation_keeps_older_keys_in_order(
    secrets_directory: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The first line is the key for everything new, further lines are still accepted."""
    both = (bytes.fromhex(KEY), bytes.fromhex(OLDER_KEY))
    content = text.format(new=KEY, old=OLDER_KEY)
    (secrets_directory / "master_key").write_text(content, encoding="ascii", newline="")
    assert load().secrets.keys("master_key") == both
    monkeypatch.setenv("METAQORE_SECRETS__MASTER_KEY", content)
    assert load().secrets.keys("master_key") == both


@pytest.mark.parametrize(
    "content",
    ["", "\n \n", "no hexadecimal", KEY[:-2], KEY + "ab", f"{KEY}\n{OLDER_KEY[:-1]}", f"{KEY}\n{PASSWORD}"],
    ids=["empty", "blank", "text", "short", "long", "odd", "one-bad-line"],
)
def test_malformed_secret(secrets_directory: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """One bad line spoils the secret; the message says where it came from and nothing of what it is."""
    path = secrets_directory / "signing_key"
    path.write_text(content, encoding="ascii")
    with pytest.raises(ConfigurationError) as from_file:
        load().secrets.keys("signing_key")
    path.unlink()
    monkeypatch.setenv("METAQORE_SECRETS__SIGNING_KEY", content)
    with pytest.raises(ConfigurationError) as from_environment:
        load().secrets.keys("signing_key")
    for caught, where in ((from_file, str(path)), (from_environment, "METAQORE_SECRETS__SIGNING_KEY")):
        told = caught.value.detail
        assert told == f"{where} must hold 32-byte keys in hexadecimal, one a line"
        assert caught.value.__cause__ is None


def test_missing_secret(secrets_directory: Path) -> None:
    """The message says which file is missing and which command makes it."""
    (secrets_directory / "key_pepper").unlink()
    with pytest.raises(ConfigurationError, match="secret key_pepper is missing") as caught:
        load().secrets.keys("key_pepper")
    assert str(secrets_directory / "key_pepper") in caught.value.detail
    assert "flask secrets create" in caught.value.detail


@pytest.mark.parametrize("kind", ["folder", "not-ascii"])
def test_unreadable_secret(secrets_directory: Path, kind: str) -> None:
    """A secret that cannot be read is told from a missing one."""
    path = secrets_directory / "master_key"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff" + PASSWORD.encode())
    with pytest.raises(ConfigurationError, match="secret master_key cannot be read from") as caught:
        load().secrets.keys("master_key")
    assert PASSWORD not in caught.value.detail


def test_secrets_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither printing nor dumping the settings shows a key."""
    for name in SECRET_NAMES:
        monkeypatch.setenv(f"METAQORE_SECRETS__{name.upper()}", KEY)
    loaded = load()
    for shown in (repr(loaded), str(loaded), repr(loaded.secrets), repr(loaded.model_dump()), loaded.model_dump_json()):
        assert KEY not in shown


# --- The key for MetaQore, which is another server's and has no form of ours ----------------------------


def test_the_key_for_metaqore_is_optional(secrets_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither variable nor file: no key. The variable wins over the file, and space around it does not matter."""
    assert load().secrets.metaqore_key() is None
    (secrets_directory / "metaqore_api_key").write_text(" mq-from-file\n", encoding="ascii")
    assert load().secrets.metaqore_key() == "mq-from-file"
    monkeypatch.setenv("METAQORE_SECRETS__METAQORE_API_KEY", "mq-from-variable")
    assert load().secrets.metaqore_key() == "mq-from-variable"
    assert "mq-from" not in repr(load())


@pytest.mark.parametrize(
    "content", ["", " \n", f"{PASSWORD}\r\nX-Other: 1", f"{PASSWORD} {PASSWORD}", f"{PASSWORD}\x7f", f"é{PASSWORD}"]
)
def test_a_malformed_key_for_metaqore(secrets_directory: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """What cannot be one header's value stops the start; nothing of it is shown."""
    path = secrets_directory / "metaqore_api_key"
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(ConfigurationError) as from_file:
        load().secrets.metaqore_key()
    assert str(path) in from_file.value.detail
    monkeypatch.setenv("METAQORE_SECRETS__METAQORE_API_KEY", content)
    with pytest.raises(ConfigurationError) as from_environment:
        load().secrets.metaqore_key()
    assert PASSWORD not in from_file.value.detail + from_environment.value.detail
