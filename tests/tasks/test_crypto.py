"""What is sealed can be read with the right key, in the right place and unchanged, or not at all.

A flaw here shows nowhere else: everything still works, and payloads are merely no longer secret or no longer honest.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.crypto import (
    KEY_BYTES,
    KEY_ID_BYTES,
    NONCE_BYTES,
    DecryptionFailed,
    KeyWrapper,
    Signer,
    derive,
    seal,
    unseal,
)

TAG_BYTES = 16
OLD, NEW = b"o" * KEY_BYTES, b"n" * KEY_BYTES


def flipped(data: bytes, index: int, bit: int = 0) -> bytes:
    """Return `data` with one bit changed."""
    return data[:index] + bytes([data[index] ^ 1 << bit]) + data[index + 1 :]


@given(st.binary(max_size=200), st.text(max_size=40))
def test_seal_round_trip(plaintext: bytes, context: str) -> None:
    """What was sealed comes back, and sealed values are as long as the format says."""
    key = os.urandom(KEY_BYTES)
    sealed = seal(key, plaintext, context)
    assert unseal(key, sealed, context) == plaintext
    assert len(sealed) == NONCE_BYTES + len(plaintext) + TAG_BYTES


def test_equal_plaintexts_are_sealed_differently() -> None:
    """A nonce is never used twice: with AES-GCM that would give away both plaintexts and the signing key."""
    key = os.urandom(KEY_BYTES)
    sealed = {seal(key, b"the same", "context") for _ in range(2000)}
    assert len({value[:NONCE_BYTES] for value in sealed}) == 2000


def test_every_changed_bit_of_a_sealed_value_is_noticed() -> None:
    """In the nonce, in the ciphertext, in the tag."""
    key = os.urandom(KEY_BYTES)
    sealed = seal(key, b"fire the torpedoes", "payload:gw_1")
    for index in range(len(sealed)):
        for bit in range(8):
            with pytest.raises(DecryptionFailed):
                unseal(key, flipped(sealed, index, bit), "payload:gw_1")


def test_every_cut_of_a_sealed_value_is_noticed() -> None:
    """Also where nothing is left, and where something was added."""
    key = os.urandom(KEY_BYTES)
    sealed = seal(key, b"text", "c")
    for length in range(len(sealed)):
        with pytest.raises(DecryptionFailed):
            unseal(key, sealed[:length], "c")
        with pytest.raises(DecryptionFailed):
            unseal(key, sealed[length + 1 :], "c")
    with pytest.raises(DecryptionFailed):
        unseal(key, sealed + b"\x00", "c")


@pytest.mark.parametrize("context", ["", "payload:gw_2", "payload:gw_1 ", "result:gw_1", "payload:gw_1\x00"])
def test_a_sealed_value_cannot_be_moved(context: str) -> None:
    """A value of one request or field is not accepted for another."""
    key = os.urandom(KEY_BYTES)
    sealed = seal(key, b"text", "payload:gw_1")
    with pytest.raises(DecryptionFailed):
        unseal(key, sealed, context)


def test_another_key_opens_nothing() -> None:
    """Each request's key opens its own values only."""
    sealed = seal(os.urandom(KEY_BYTES), b"text", "c")
    with pytest.raises(DecryptionFailed):
        unseal(os.urandom(KEY_BYTES), sealed, "c")


def test_failure_tells_nothing_of_the_plaintext() -> None:
    """The error's text, which may be logged, is the place of the value alone."""
    key = os.urandom(KEY_BYTES)
    with pytest.raises(DecryptionFailed) as caught:
        unseal(key, flipped(seal(key, b"xyzzy", "payload:gw_1"), 20), "payload:gw_1")
    assert str(caught.value) == "payload:gw_1"


@given(st.text(max_size=40))
def test_wrapping_round_trip(owner: str) -> None:
    """A data key unwraps for its owner; each is a new one of full length."""
    wrapper = KeyWrapper((NEW,))
    key, wrapped = wrapper.new_key(owner)
    other_key, other_wrapped = wrapper.new_key(owner)
    assert wrapper.unwrap(wrapped, owner) == key
    assert len({key, other_key}) == len({wrapped, other_wrapped}) == 2
    assert len(key) == KEY_BYTES
    assert key not in wrapped


def test_every_changed_bit_of_a_wrapped_key_is_noticed() -> None:
    """Also in the four bytes that name the master key."""
    wrapper = KeyWrapper((NEW, OLD))
    _, wrapped = wrapper.new_key("gw_1")
    for index in range(len(wrapped)):
        for bit in range(8):
            with pytest.raises(DecryptionFailed):
                wrapper.unwrap(flipped(wrapped, index, bit), "gw_1")
    for length in range(len(wrapped)):
        with pytest.raises(DecryptionFailed):
            wrapper.unwrap(wrapped[:length], "gw_1")


def test_a_wrapped_key_belongs_to_its_owner() -> None:
    """Copying one request's wrapped key into another's row gives nothing."""
    wrapper = KeyWrapper((NEW,))
    _, wrapped = wrapper.new_key("gw_1")
    for owner in ("gw_2", "", "data-key:gw_1"):
        with pytest.raises(DecryptionFailed):
            wrapper.unwrap(wrapped, owner)


def test_rotating_the_master_key() -> None:
    """The old key still unwraps what it wrapped, everything new is wrapped by the new one, and order decides which."""
    key, wrapped = KeyWrapper((OLD,)).new_key("gw_1")
    both = KeyWrapper((NEW, OLD))
    assert both.unwrap(wrapped, "gw_1") == key
    later_key, later_wrapped = both.new_key("gw_2")
    assert KeyWrapper((NEW,)).unwrap(later_wrapped, "gw_2") == later_key
    with pytest.raises(DecryptionFailed):
        KeyWrapper((OLD,)).unwrap(later_wrapped, "gw_2")
    with pytest.raises(DecryptionFailed):
        KeyWrapper((NEW,)).unwrap(wrapped, "gw_1")
    assert wrapped[:KEY_ID_BYTES] != later_wrapped[:KEY_ID_BYTES]


def test_a_wrapped_key_does_not_show_its_master_key() -> None:
    """The name of the master key is no part of it."""
    _, wrapped = KeyWrapper((NEW,)).new_key("gw_1")
    assert wrapped[:KEY_ID_BYTES] not in NEW


@given(st.binary(max_size=100))
def test_rotating_the_signing_key(content: bytes) -> None:
    """Both keys are accepted while both are known; what is new is signed with the first."""
    before, during, after = Signer((OLD,)), Signer((NEW, OLD)), Signer((NEW,))
    assert during.verifies(content, before.sign(content))
    assert during.sign(content) == after.sign(content)
    assert not after.verifies(content, before.sign(content))
    assert not before.verifies(content, during.sign(content))


def test_every_changed_bit_of_a_signature_is_noticed() -> None:
    """In the signature and in what was signed; a part of a signature is none."""
    signer = Signer((NEW, OLD))
    content = b"content"
    signature = signer.sign(content)
    assert signer.verifies(content, signature)
    for index in range(len(signature)):
        for bit in range(8):
            assert not signer.verifies(content, flipped(signature, index, bit))
        assert not signer.verifies(content, signature[:index])
    for index in range(len(content)):
        assert not signer.verifies(flipped(content, index), signature)
    assert not signer.verifies(content, signature + b"\x00")


def test_derived_secrets_depend_on_all_three() -> None:
    """Another secret, purpose or subject gives another value; the same ones give the same."""
    values = [
        derive(secret, purpose, subject)
        for secret in (OLD, NEW)
        for purpose in ("cache-salt", "cache-sal", "")
        for subject in ("acme", "t-acme", "")
    ]
    assert len(set(values)) == len(values)
    assert {len(value) for value in values} == {32}
    assert derive(OLD, "cache-salt", "acme") == values[0]
