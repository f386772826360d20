"""Keeping payloads secret and messages honest.

Every request has a data key of its own, and all that is stored for it, in SQL and in Redis, is sealed with that key
(AES-256-GCM). The data key itself is kept wrapped by the master key. Destroying one wrapped key erases one request,
while hashes of its ciphertext stay verifiable.

A sealed value is nonce (12 bytes) + ciphertext + tag (16 bytes). Its context string is authenticated with it, so
that a value cannot be moved to another request or field. A wrapped key starts with four bytes that name its master
key, so that master keys can be rotated.
"""

from __future__ import annotations

import hashlib
import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12
KEY_BYTES = 32
KEY_ID_BYTES = 4


class DecryptionFailed(Exception):
    """A sealed value was altered, moved, or sealed with a key this process does not have."""


def seal(key: bytes, plaintext: bytes, context: str) -> bytes:
    """Encrypt and authenticate `plaintext` together with `context`."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, context.encode())


def unseal(key: bytes, sealed: bytes, context: str) -> bytes:
    """Return what `seal` was given. Raises DecryptionFailed if anything differs."""
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context.encode())
    except (InvalidTag, ValueError) as error:
        raise DecryptionFailed(context) from error


class KeyWrapper:
    """Makes data keys and wraps them with the newest of `master_keys`; older ones still unwrap."""

    def __init__(self, master_keys: tuple[bytes, ...]) -> None:
        self._by_id = {hashlib.sha256(key).digest()[:KEY_ID_BYTES]: key for key in master_keys}
        self._current_id = hashlib.sha256(master_keys[0]).digest()[:KEY_ID_BYTES]

    def new_key(self, owner: str) -> tuple[bytes, bytes]:
        """Return a new data key and its wrapped form, which only unwraps for the same `owner`."""
        key = os.urandom(KEY_BYTES)
        return key, self._current_id + seal(self._by_id[self._current_id], key, f"data-key:{owner}")

    def unwrap(self, wrapped: bytes, owner: str) -> bytes:
        """Return the data key. Raises DecryptionFailed for another owner or an unknown master key."""
        master = self._by_id.get(wrapped[:KEY_ID_BYTES])
        if master is None:
            raise DecryptionFailed(f"data-key:{owner}")
        return unseal(master, wrapped[KEY_ID_BYTES:], f"data-key:{owner}")


class Signer:
    """Signs with the newest of `keys` (HMAC-SHA256) and accepts signatures of all of them."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys

    def sign(self, content: bytes) -> bytes:
        """Return the 32-byte signature of `content`."""
        return hmac.digest(self._keys[0], content, "sha256")

    def verifies(self, content: bytes, signature: bytes) -> bool:
        """Tell whether one of the keys made `signature` for `content`."""
        return any(hmac.compare_digest(hmac.digest(key, content, "sha256"), signature) for key in self._keys)


def derive(secret: bytes, purpose: str, subject: str) -> bytes:
    """Return 32 bytes that depend on all three arguments and reveal nothing about `secret`."""
    return hmac.digest(secret, f"{purpose}\x00{subject}".encode(), "sha256")
