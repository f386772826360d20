"""Settings that are secrets, and the folder that they are read from.

Secrets are files in `secrets.directory`, or variables named `METAQORE_SECRETS__NAME`. Each holds keys of 32 bytes
in hexadecimal, one a line: the first is used for everything new, the others are still accepted, which is how a key
is rotated.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from tasks.errors import ConfigurationError
from tasks.settings.environment import PREFIX
from tasks.settings.group import ExpandedPath, Group

KEY_BYTES = 32
SECRET_NAMES = ("master_key", "signing_key", "organization_salt", "key_pepper")


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
