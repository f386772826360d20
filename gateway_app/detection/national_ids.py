"""Numbers that a state gives to a person. The library `python-stdnum` knows their checksums.

Some say by their form what they are: dashes and dots in certain places, letters, a fixed beginning. Those are found
anywhere. Others are bare digits, of which one in ten or one in eleven passes by chance; those are found only within a
few words after one that names them.
"""

from __future__ import annotations

import re

from stdnum.br import cpf
from stdnum.ch import ssn as ahv
from stdnum.de import idnr
from stdnum.es import dni, nie
from stdnum.fr import nir
from stdnum.in_ import aadhaar
from stdnum.it import codicefiscale
from stdnum.nl import bsn
from stdnum.pl import pesel
from stdnum.us import ssn

from gateway_app.detection.rule import Check, Rule, rule, shape_rule, text_check

#: What may stand between the word and the number, in bytes.
_GAP = 32
_DATE_LIKE = re.compile(rb"(?:19|20)[0-9]{2}[01][0-9][0-3][0-9]")
#: Letters that a National Insurance number does not begin with, and pairs that were never given out.
_NINO = re.compile(rb"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?(?:[0-9]{2} ?){3}[A-D]")


def _is_nino(found: bytes) -> bool:
    return _NINO.fullmatch(found) is not None


def _upper(check: Check) -> Check:
    """Return a check that refuses lower case, which hashes and identifiers have, and these numbers have not."""
    return lambda found: found == found.upper() and check(found)


def _is_dni(found: bytes) -> bool:
    return _DATE_LIKE.match(found) is None and dni.is_valid(found.decode())


def _grouped_aadhaar(found: bytes) -> bool:
    return aadhaar.is_valid(found.decode())


_US_SSN, _FR_NIR, _CH_AHV, _BR_CPF = (text_check(module.is_valid) for module in (ssn, nir, ahv, cpf))
_ES_NIE, _IT_CODE = text_check(nie.is_valid), text_check(codicefiscale.is_valid)


def _named(kind: str, words: tuple[bytes, ...], number: bytes, check: Check) -> list[Rule]:
    """Return the rules for a number, as it is in lower case, that follows one of `words`."""
    return [
        rule(
            kind,
            "lower",
            word,
            word + rb"(?<![a-z]" + word + rb")(?![a-z])[^\n]{0,%d}?(?<![0-9a-z_.])(" % _GAP + number
            + rb")(?![0-9a-z_]|[.-][0-9])",
            check,
        )
        for word in words
    ]  # fmt: skip


CONTEXT_RULES: tuple[Rule, ...] = (
    *_named("us_ssn", (b"ssn", b"ssns", b"social security", b"social_security", b"socialsecurity", b"social-security",
                       b"socialsecuritynumber", b"ssn_number"),
            rb"[0-9]{3}[ .-]?[0-9]{2}[ .-]?[0-9]{4}", lambda found: ssn.is_valid(_bare(found))),
    *_named("de_tax_id", (b"steuer", b"steuerid", b"steueridnr", b"steueridentifikationsnummer",
                          b"identifikationsnummer", b"idnr", b"tin", b"tax id", b"tax_id", b"taxid", b"tax-id",
                          b"tax identification"),
            rb"[0-9]{2}[ /.]?[0-9]{3}[ /.]?[0-9]{3}[ /.]?[0-9]{3}", lambda found: idnr.is_valid(_bare(found))),
    *_named("fr_nir", (b"nir", b"secu", b"securite sociale", b"securite_sociale", b"insee", b"vitale",
                       b"social security", b"social_security"),
            rb"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9ab] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}", _FR_NIR),
    *_named("es_dni", (b"dni", b"nif", b"nie", b"documento"),
            rb"[xyz]-?[0-9]{7}-?[a-z]|[0-9]{2}\.?[0-9]{3}\.?[0-9]{3}[ -]?[a-z]",
            lambda found: dni.is_valid(_bare(found)) or nie.is_valid(_bare(found))),
    *_named("pl_pesel", (b"pesel",), rb"[0-9]{11}", text_check(pesel.is_valid)),
    *_named("nl_bsn", (b"bsn", b"burgerservicenummer", b"sofinummer", b"burger_service_nummer"),
            rb"[0-9]{4}[ .]?[0-9]{2}[ .]?[0-9]{3}|[0-9]{3}[ .]?[0-9]{3}[ .]?[0-9]{3}",
            lambda found: bsn.is_valid(_bare(found))),
    *_named("in_aadhaar", (b"aadhaar", b"aadhar", b"uidai"),
            rb"[2-9][0-9]{3}[ -]?[0-9]{4}[ -]?[0-9]{4}", lambda found: aadhaar.is_valid(_bare(found))),
    *_named("uk_nino", (b"nino", b"national insurance", b"national_insurance", b"insurance number"),
            rb"[a-z]{2}[ -]?[0-9]{2}[ -]?[0-9]{2}[ -]?[0-9]{2}[ -]?[a-d]",
            lambda found: _is_nino(_bare(found).upper().encode())),
    *_named("br_cpf", (b"cpf",), rb"[0-9]{11}", _BR_CPF),
)  # fmt: skip

SHAPE_RULES: tuple[Rule, ...] = (
    shape_rule("us_ssn", b"000-00-0000", _US_SSN),
    shape_rule("uk_nino", b"aa000000a", _is_nino),
    shape_rule("uk_nino", b"aa 00 00 00 a", _is_nino),
    shape_rule("fr_nir", b"0 00 00 00 000 000 00", _FR_NIR),
    shape_rule("fr_nir", b"0 00 00 0a 000 000 00", _FR_NIR),
    shape_rule("es_dni", b"00000000a", _upper(_is_dni)),
    shape_rule("es_dni", b"00000000-a", _upper(_is_dni)),
    shape_rule("es_dni", b"a0000000a", _upper(_ES_NIE)),
    shape_rule("es_dni", b"a-0000000-a", _upper(_ES_NIE)),
    shape_rule("it_fiscal_code", b"aaaaaa00a00a000a", _IT_CODE),
    shape_rule("in_aadhaar", b"0000 0000 0000", _grouped_aadhaar, before=(b"0 ",), after=(b" 00",)),
    shape_rule("ch_ahv", b"000.0000.0000.00", _CH_AHV),
    shape_rule("br_cpf", b"000.000.000-00", _BR_CPF),
)


def _bare(found: bytes) -> str:
    """Return a number without what separates its groups."""
    return found.translate(None, b" .-/").decode("ascii")
