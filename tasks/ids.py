"""Request ids: UUIDv7 behind a `gw_` prefix, so that they sort by the time they were made.

They are stored, logged and shown in this one form. The lower-case hexadecimal keeps time order under byte-wise
comparison, which is what PostgreSQL's range partitions use.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import uuid_utils

PREFIX = "gw_"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: An id as a regular expression, without anchors.
PATTERN = r"gw_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}"
_REQUEST_ID = re.compile(PATTERN)


def new_request_id() -> str:
    """Return a new id, later than every id this process made before."""
    return PREFIX + uuid_utils.uuid7().hex


def is_request_id(text: str) -> bool:
    """Tell whether `text` has the form of a request id."""
    return _REQUEST_ID.fullmatch(text) is not None


def made_at(request_id: str) -> datetime:
    """Return the instant an id was made, which is when its request arrived, to the millisecond."""
    milliseconds = int(request_id.removeprefix(PREFIX)[:12], 16)
    return _EPOCH + timedelta(milliseconds=milliseconds)


def lower_bound(moment: datetime) -> str:
    """Return the smallest string that sorts before every id made at or after `moment`."""
    milliseconds = (moment - _EPOCH) // timedelta(milliseconds=1)
    return f"{PREFIX}{milliseconds:012x}"
