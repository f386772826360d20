"""Secrets that no text holds by chance, and the forms in which they might turn up where nothing of a prompt may be."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Iterable
from urllib.parse import quote

#: Of a secret's token ids, so many in a row are no chance.
_TOKENS = 8


class Canaries:
    """Makes secrets, each for a place that a client, or a model, may put text into.

    `tokens` returns the ids that a text has for the model.
    """

    def __init__(self, tokens: Callable[[str], list[int]] | None = None) -> None:
        self._tokens = tokens
        self._secrets: dict[str, str] = {}

    def __call__(self, place: str) -> str:
        """Return the secret of a place: letters and digits, as any place takes them. It is made once."""
        return self._secrets.setdefault(place, f"canary{secrets.token_hex(12)}")

    def add(self, place: str, text: str) -> None:
        """Count a text as a secret that the test did not make."""
        self._secrets[place] = text

    def found_in(self, content: bytes) -> list[str]:
        """Return which secrets `content` holds, and in which form."""
        return [
            f"{place} as {name}"
            for place, secret in self._secrets.items()
            for name, form in forms(secret, self._tokens)
            if form in content
        ]


def forms(secret: str, tokens: Callable[[str], list[int]] | None = None) -> Iterable[tuple[str, bytes]]:
    """Return the forms of a secret, by name."""
    raw = secret.encode()
    yield "text", raw
    yield "JSON", json.dumps(secret)[1:-1].encode()
    yield "URL", quote(secret).encode()
    yield "hexadecimal", raw.hex().encode()
    yield "HEXADECIMAL", raw.hex().upper().encode()
    yield "UTF-16", secret.encode("utf-16-le")
    for shift in range(3):
        # Wherever the secret begins in what was encoded, this part of it looks alike.
        encoded = base64.b64encode(b"\0" * shift + raw)
        yield f"base64, {shift} off", encoded[4 if shift else 0 : len(encoded) - 4]
    yield "reversed", raw[::-1]
    ids = tokens(secret) if tokens is not None else []
    if len(ids) > _TOKENS:
        # What stands around a text may change its outermost tokens.
        middle = ids[2 : 2 + _TOKENS]
        for separator in (", ", ",", " "):
            yield "token ids", separator.join(map(str, middle)).encode()
