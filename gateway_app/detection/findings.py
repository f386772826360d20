"""What a scan tells: how many of each kind, and never a word of what was found.

Kinds fall into two classes, those of MetaQore's flags. Data about a person is private; what opens a door or an account
is sensitive. Either makes a task `sensitive` there, and both are told apart so that the record says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

DataClass = Literal["private", "sensitive"]

#: Every kind there is, with its class. The names appear in audit records, so they never change their meaning.
KINDS: Mapping[str, DataClass] = MappingProxyType(
    {
        "email": "private",
        "phone": "private",
        "us_ssn": "private",
        "uk_nino": "private",
        "de_tax_id": "private",
        "fr_nir": "private",
        "es_dni": "private",
        "it_fiscal_code": "private",
        "pl_pesel": "private",
        "nl_bsn": "private",
        "in_aadhaar": "private",
        "ch_ahv": "private",
        "br_cpf": "private",
        "credit_card": "sensitive",
        "iban": "sensitive",
        "private_key": "sensitive",
        "jwt": "sensitive",
        "api_key": "sensitive",
        "bearer_token": "sensitive",
        "url_password": "sensitive",
        "named_secret": "sensitive",
    }
)


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found. `counts` has the kinds that were, each with its number, at most detector.MAX_COUNT."""

    counts: Mapping[str, int]

    @property
    def private(self) -> bool:
        """Tell whether there is data about a person."""
        return any(KINDS[kind] == "private" for kind in self.counts)

    @property
    def sensitive(self) -> bool:
        """Tell whether there are secrets, cards or bank accounts."""
        return any(KINDS[kind] == "sensitive" for kind in self.counts)
