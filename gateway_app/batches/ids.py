"""Ids of files and batches: UUIDv7 behind OpenAI's prefixes, so that lists of them are in the order of their making."""

from __future__ import annotations

import re

import uuid_utils

FILE = "file-"
BATCH = "batch_"
#: What a list may be told to go on after.
PATTERN = r"^(file-|batch_)[0-9a-f]{32}$"
_HEX = re.compile(r"[0-9a-f]{32}")


def new_id(prefix: str) -> str:
    """Return a new id, later than every id this process made before."""
    return prefix + uuid_utils.uuid7().hex


def is_id(text: str, prefix: str) -> bool:
    """Tell whether `text` has the form of an id; what has not need not be looked for."""
    return text.startswith(prefix) and _HEX.fullmatch(text.removeprefix(prefix)) is not None
