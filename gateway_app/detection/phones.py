"""Tells telephone numbers from other digits, by the numbering plans that the library `phonenumbers` carries.

Its own parser takes some 30 µs a number, which a log full of digits would make too slow. What is used is its data: for
each country, patterns of the numbers that are given out. They are joined into one pattern a calling code, compiled
when that is first met.
"""

from __future__ import annotations

import functools
import re

from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, PhoneMetadata

#: Countries whose numbers are known without a calling code. These begin with a 0 within the country …
WITH_ZERO = ("GB", "IE", "DE", "AT", "CH", "FR", "BE", "NL", "SE", "FI", "AU")
#: … and these do not. Those with numbers of eight digits or fewer are left out: too much else has as many.
WITHOUT_ZERO = ("US", "CA", "ES", "PT", "IT", "PL", "IN", "BR", "MX")
#: An Italian number keeps its 0.
_ZERO_KEPT = "IT"
_LONGEST_CALLING_CODE = 3
_NORTH_AMERICAN = "1"
_KINDS = (
    "fixed_line",
    "mobile",
    "toll_free",
    "premium_rate",
    "shared_cost",
    "personal_number",
    "voip",
    "pager",
    "uan",
)


def prepare() -> None:
    """Compile what the countries named here need, so that no request waits for it."""
    for region in (*WITH_ZERO, *WITHOUT_ZERO):
        _region(region)
    _calling_code(1)


def is_calling_code(digits: str) -> bool:
    """Tell whether `digits` are a country's calling code."""
    return len(digits) <= _LONGEST_CALLING_CODE and int(digits) in COUNTRY_CODE_TO_REGION_CODE


def is_international(digits: str) -> bool:
    """Tell whether `digits`, written after a plus sign, are a number that some country gives out."""
    for length in range(1, _LONGEST_CALLING_CODE + 1):
        pattern = _calling_code(int(digits[:length] or "0"))
        if pattern is not None:
            national = digits[length:]
            # Many write the 0 that is dialled within the country, in parentheses.
            return bool(pattern.fullmatch(national) or (national[:1] == "0" and pattern.fullmatch(national[1:])))
    return False


def is_national(digits: str) -> bool:
    """Tell whether `digits` are a number as it is dialled within one of the countries named here, or from there."""
    if digits.startswith("00"):
        return is_international(digits[2:])
    if digits.startswith("0"):
        return any(_region(region).fullmatch(digits[1:]) for region in WITH_ZERO) or bool(
            _region(_ZERO_KEPT).fullmatch(digits)
        )
    return is_north_american(digits) or any(_region(region).fullmatch(digits) for region in WITHOUT_ZERO)


def is_north_american(digits: str) -> bool:
    """Tell whether `digits` are a number of the United States or Canada, with or without the leading 1."""
    national = digits.removeprefix(_NORTH_AMERICAN)
    return any(_region(region).fullmatch(national) for region in ("US", "CA"))


@functools.cache
def _calling_code(code: int) -> re.Pattern[str] | None:
    """Return the numbers behind a calling code, or None if there is no such code. There are some 220."""
    regions = COUNTRY_CODE_TO_REGION_CODE.get(code)
    if regions is None:
        return None
    if regions == ("001",):
        return _joined([PhoneMetadata.metadata_for_nongeo_region(code, None)])
    return _joined([PhoneMetadata.metadata_for_region(region, None) for region in regions])


@functools.cache
def _region(region: str) -> re.Pattern[str]:
    return _joined([PhoneMetadata.metadata_for_region(region, None)])


def _joined(plans: list[PhoneMetadata | None]) -> re.Pattern[str]:
    found = [getattr(plan, kind) for plan in plans for kind in _KINDS]
    patterns = {kind.national_number_pattern for kind in found if kind is not None}
    return re.compile("|".join(sorted(pattern for pattern in patterns if pattern and pattern != "NA")) or "(?!)")
