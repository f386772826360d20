"""The detector that the other tests here rely on finds what it is to find."""

from __future__ import annotations

import base64
import json

import pytest

from tests.privacy.canaries import Canaries


def numbers(text: str) -> list[int]:
    """Stand in for a tokenizer: an id a character."""
    return [1000 + ord(character) for character in text]


@pytest.mark.parametrize(
    "shown",
    [
        str.encode,
        lambda text: json.dumps({"a": text}).encode(),
        lambda text: text.encode().hex().encode(),
        lambda text: text.encode("utf-16"),
        lambda text: base64.b64encode(b"x" + text.encode()),
        lambda text: base64.b64encode(b"xy" + text.encode() + b"z"),
        lambda text: base64.urlsafe_b64encode(text.encode()),
        lambda text: repr(numbers(f"before {text} after")).encode(),
    ],
)
def test_a_secret_is_found(shown: object) -> None:
    """In each form, in the middle of whatever else there is."""
    assert callable(shown)
    canaries = Canaries(numbers)
    content = b"\x00 before " + shown(canaries("directive")) + b" after"
    assert canaries.found_in(content)
    assert not Canaries(numbers).found_in(content)


def test_nothing_is_found_where_nothing_is() -> None:
    """Neither of a secret that is not there, nor of a half of it."""
    canaries = Canaries(numbers)
    secret = canaries("directive")
    assert canaries.found_in(f"canary {secret[:16]} {numbers(secret)[:4]}".encode()) == []
