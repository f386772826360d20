"""Numbers that states give to people, with checksums worked out here or by the library's own generators."""

from __future__ import annotations

import random
import string

from stdnum import verhoeff
from stdnum.de import idnr
from stdnum.it import codicefiscale


def digits(rng: random.Random, count: int) -> str:
    """Return random digits."""
    return "".join(rng.choices(string.digits, k=count))


def grouped(number: str, groups: tuple[int, ...], separator: str) -> str:
    """Return the number in groups of these lengths."""
    parts, at = [], 0
    for length in groups:
        parts.append(number[at : at + length])
        at += length
    return separator.join(parts)


def us_ssn(rng: random.Random) -> str:
    """Return a number in dashes, or any way after its name."""
    parts = (
        f"{rng.choice([*range(1, 666), *range(667, 900)]):03d}",
        f"{rng.randint(1, 99):02d}",
        f"{rng.randint(1, 9999):04d}",
    )
    if rng.random() < 0.6:
        return "-".join(parts)
    return rng.choice(['"ssn": "%s"', "SSN %s", "social security number: %s", "ssn=%s"]) % rng.choice(["", " "]).join(
        parts
    )


def uk_nino(rng: random.Random) -> str:
    """Return a number in one word or in pairs."""
    prefix = rng.choice(["AB", "CE", "JG", "PX", "SR", "TW", "HM", "LL"])
    number, suffix = digits(rng, 6), rng.choice("ABCD")
    return rng.choice([f"{prefix}{number}{suffix}", " ".join([prefix, number[:2], number[2:4], number[4:], suffix])])


def de_tax_id(rng: random.Random) -> str:
    """Return a number after its name: one digit of the first ten comes twice, one not at all."""
    kept = rng.sample("0123456789", 9)
    body = [*kept, rng.choice(kept)]
    while True:
        rng.shuffle(body)
        if body[0] != "0":
            break
    number = next(whole for check in string.digits if idnr.is_valid(whole := "".join(body) + check))
    written = rng.choice([number, grouped(number, (2, 3, 3, 3), " ")])
    return (
        rng.choice(["Steuer-ID: %s", "IdNr. %s", '"tax_id": "%s"', "Steueridentifikationsnummer %s", "TIN %s"])
        % written
    )


def fr_nir(rng: random.Random) -> str:
    """Return a number in its printed groups, or in one after its name."""
    parts = (rng.choice("12"), digits(rng, 2), f"{rng.randint(1, 12):02d}", f"{rng.choice([*range(1, 20), *range(21, 96)]):02d}",
             f"{rng.randint(1, 900):03d}", f"{rng.randint(1, 999):03d}")  # fmt: skip
    key = f"{97 - int(''.join(parts)) % 97:02d}"
    if rng.random() < 0.6:
        return " ".join([*parts, key])
    return rng.choice(["NIR: %s", "numéro de sécurité sociale : %s", '"nir": "%s"', "n° sécu %s"]) % "".join(
        [*parts, key]
    )


def es_dni(rng: random.Random) -> str:
    """Return a number of a citizen or a foreigner."""
    letters = "TRWAGMYFPDXBNJZSQVHLCKE"
    if rng.random() < 0.5:
        number = str(rng.randint(30_000_000, 99_999_999))
        return number + rng.choice(["", "-"]) + letters[int(number) % 23]
    first, rest = rng.choice("XYZ"), digits(rng, 7)
    letter = letters[int(f"{'XYZ'.index(first)}{rest}") % 23]
    return rng.choice([f"{first}{rest}{letter}", f"{first}-{rest}-{letter}"])


def it_fiscal_code(rng: random.Random) -> str:
    """Return a code."""
    consonants = "".join(rng.choices("BCDFGLMNPRSTVZ", k=6))
    body = f"{consonants}{rng.randint(40, 99)}{rng.choice('ABCDEHLMPRST')}{rng.randint(1, 28):02d}{rng.choice('ADFHL')}{rng.randint(100, 999)}"
    code = body + codicefiscale.calc_check_digit(body)
    return code.lower() if rng.random() < 0.2 else code


def pl_pesel(rng: random.Random) -> str:
    """Return a number after its name."""
    body = f"{rng.randint(40, 99):02d}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{digits(rng, 4)}"
    check = -sum(int(digit) * weight for digit, weight in zip(body, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3), strict=True)) % 10
    return rng.choice(["PESEL: %s", '"pesel": "%s"', "nr PESEL %s", "pesel=%s"]) % f"{body}{check}"


def nl_bsn(rng: random.Random) -> str:
    """Return a number after its name."""
    while True:
        body = digits(rng, 8)
        check = sum(int(digit) * weight for digit, weight in zip(body, range(9, 1, -1), strict=True)) % 11
        if check < 10 and int(body) > 0:
            return rng.choice(["BSN: %s", '"bsn": "%s"', "burgerservicenummer %s", "bsn nummer %s"]) % f"{body}{check}"


def in_aadhaar(rng: random.Random) -> str:
    """Return a number in its printed groups, or after its name."""
    while True:
        body = rng.choice("23456789") + digits(rng, 10)
        number = body + verhoeff.calc_check_digit(body)
        if number != number[::-1]:
            break
    if rng.random() < 0.6:
        return grouped(number, (4, 4, 4), " ")
    return rng.choice(["Aadhaar: %s", '"aadhaar": "%s"', "aadhaar no. %s"]) % number


def ch_ahv(rng: random.Random) -> str:
    """Return a number with its dots."""
    body = "756" + digits(rng, 9)
    check = -sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10
    return grouped(f"{body}{check}", (3, 4, 4, 2), ".")


def br_cpf(rng: random.Random) -> str:
    """Return a number with its dots and dash."""
    number = digits(rng, 9)
    for _ in range(2):
        total = sum(int(digit) * (len(number) + 1 - place) for place, digit in enumerate(number))
        number += str(-total % 11 % 10)
    return f"{number[:3]}.{number[3:6]}.{number[6:9]}-{number[9:]}"
