"""Values of every kind, as people and programs write them, made from a seed.

Nothing here looks at the detector. Checksums are worked out by this module or by the libraries' own generators, and
telephone numbers are written by `phonenumbers` as each country does.
"""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Callable

import phonenumbers

from tests.gateway_app.detection import identities
from tests.gateway_app.detection.identities import digits, grouped

Maker = Callable[[random.Random], str]
ALNUM = string.ascii_letters + string.digits


def some(rng: random.Random, alphabet: str, low: int, high: int | None = None) -> str:
    """Return random characters, one digit at least among them if the alphabet has digits."""
    text = rng.choices(alphabet, k=rng.randint(low, high or low))
    if set(alphabet) & set(string.digits):
        for place in rng.sample(range(len(text)), min(4, len(text))):
            text[place] = rng.choice([character for character in alphabet if character.isdigit()])
    return "".join(text)


def luhn_digit(number: str) -> str:
    """Return the digit that makes Luhn's sum right."""
    total = 0
    for place, character in enumerate(reversed(number)):
        value = int(character) * (1 if place % 2 else 2)
        total += value // 10 + value % 10
    return str(-total % 10)


def card_number(rng: random.Random) -> str:
    """Return a number of one of the large issuers."""
    prefix, length = rng.choice(
        [("4", 16), ("4", 16), ("51", 16), ("55", 16), ("2223", 16), ("34", 15), ("37", 15), ("6011", 16), ("65", 16),
         ("3530", 16), ("36", 14), ("62", 16), ("4", 19)]
    )  # fmt: skip
    body = prefix + digits(rng, length - len(prefix) - 1)
    return body + luhn_digit(body)


def credit_card(rng: random.Random) -> str:
    """Return a card's number as it is typed."""
    number = card_number(rng)
    groups = {14: (4, 6, 4), 15: (4, 6, 5), 16: (4, 4, 4, 4), 19: (4, 4, 4, 4, 3)}[len(number)]
    return grouped(number, groups, rng.choice(["", "", " ", " ", "-", "\N{NO-BREAK SPACE}", "\N{NON-BREAKING HYPHEN}"]))


def iban(rng: random.Random) -> str:
    """Return an account of one of a few countries, grouped or not, in either case."""
    country, bank, rest = rng.choice(
        [("DE", "", 18), ("GB", "NWBK", 14), ("NL", "INGB", 10), ("FR", "", 23), ("ES", "", 20), ("BE", "", 12),
         ("AT", "", 16), ("CH", "", 17), ("PL", "", 24), ("IE", "AIBK", 14), ("SE", "", 20), ("PT", "", 21)]
    )  # fmt: skip
    account = bank + digits(rng, rest)
    check = 98 - int("".join(str(int(character, 36)) for character in f"{account}{country}00")) % 97
    text = f"{country}{check:02d}{account}"
    if rng.random() < 0.5:
        text = " ".join(text[at : at + 4] for at in range(0, len(text), 4))
    return text.lower() if rng.random() < 0.2 else text


def email(rng: random.Random) -> str:
    """Return an address."""
    first, last = (some(rng, string.ascii_lowercase, 2, 9) for _ in range(2))
    name = rng.choice([first, f"{first}.{last}", f"{first[0]}_{last}", f"{first}+{last}", f"{first}{rng.randrange(99)}",
                       f"{first.title()}.{last.title()}"])  # fmt: skip
    host = rng.choice(["example.org", "acme.io", "mail.acme-corp.co.uk", "uni-bern.ch", "gmail.com", "x1.museum"])
    return f"{name}@{host}"


def phone_of(rng: random.Random, region: str) -> phonenumbers.PhoneNumber:
    """Return a number that is given out in the region."""
    kind = rng.choice([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE])
    example = phonenumbers.example_number_for_type(region, kind)
    assert example is not None
    text = str(example.national_number)
    for _ in range(50):
        changed = phonenumbers.PhoneNumber(
            country_code=example.country_code,
            national_number=int(text[:-4] + digits(rng, 4)),
            italian_leading_zero=example.italian_leading_zero,
        )
        if phonenumbers.is_valid_number(changed):
            return changed
    return example


def international_phone(rng: random.Random) -> str:
    """Return a number with its calling code."""
    region = rng.choice(
        ["GB", "DE", "FR", "US", "IN", "BR", "JP", "ZA", "NG", "AU", "PL", "MX", "SG", "KE", "UA", "CH"]
    )
    form = rng.choice([phonenumbers.PhoneNumberFormat.INTERNATIONAL, phonenumbers.PhoneNumberFormat.E164])
    return phonenumbers.format_number(phone_of(rng, region), form)


def national_phone(rng: random.Random) -> str:
    """Return a number as it is written in a country where the form says what it is."""
    region = rng.choice(["US", "US", "FR", "GB"])
    return phonenumbers.format_number(phone_of(rng, region), phonenumbers.PhoneNumberFormat.NATIONAL)


def named_phone(rng: random.Random) -> str:
    """Return a number of any of some countries, as written there or without any separator, after a word."""
    number = phone_of(rng, rng.choice(["US", "ES", "IT", "PL", "DE", "GB", "IN", "NL", "BR", "PT", "AT", "BE"]))
    written = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)
    if rng.random() < 0.4:
        written = "".join(filter(str.isdigit, written))
    template = rng.choice(['"phone": "%s"', "Phone: %s", "tel. %s", "call me at %s", "mobile %s", "Telefon: %s",
                           '"phone_number": "%s"', "Fax %s", "phone number is %s", "TEL=%s", "whatsapp: %s"])  # fmt: skip
    return template % written


def private_key(rng: random.Random) -> str:
    """Return the beginning of a key in a file, as it is or in JSON."""
    name = rng.choice(
        ["RSA PRIVATE KEY", "PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "ENCRYPTED PRIVATE KEY"]
    )
    return f"-----BEGIN {name}-----{rng.choice([chr(10), chr(92) + 'n'])}{some(rng, ALNUM + '+/', 64)}"


def jwt(rng: random.Random) -> str:
    """Return a signed token, alone or in a header."""
    head, body = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": digits(rng, 8), "exp": rng.randrange(2**31)})
    )
    return (
        rng.choice(["", "Authorization: Bearer ", "token=", '"access_token": "'])
        + f"{head}.{body}.{some(rng, ALNUM, 43)}"
    )


def api_key(rng: random.Random) -> str:
    """Return a key of one of the services whose keys can be told."""
    key = rng.choice([
        "AKIA" + some(rng, string.ascii_uppercase + "234567", 16),
        rng.choice(["ghp_", "gho_", "ghs_"]) + some(rng, ALNUM, 36),
        f"github_pat_{some(rng, ALNUM, 22)}_{some(rng, ALNUM, 59)}",
        "glpat-" + some(rng, ALNUM + "_-", 19) + "a",
        f"xoxb-{digits(rng, 12)}-{digits(rng, 12)}-{some(rng, ALNUM, 24)}",
        "AIza" + some(rng, ALNUM + "_-", 34) + "a",
        "sk_live_" + some(rng, ALNUM, 24),
        "sk-" + some(rng, ALNUM, 48),
        "sk-proj-" + some(rng, ALNUM + "_-", 80),
        f"sk-ant-api03-{some(rng, ALNUM + '_-', 93)}AA",
        "npm_" + some(rng, ALNUM, 36),
        f"SG.{some(rng, ALNUM, 22)}.{some(rng, ALNUM, 43)}",
        "mq_" + some(rng, ALNUM + "_-", 42) + "a",
    ])  # fmt: skip
    return rng.choice(["%s", "export KEY=%s", '"api_key": "%s"', "api-key: %s", "Authorization: Bearer %s"]) % key


def bearer_token(rng: random.Random) -> str:
    """Return a header."""
    return rng.choice(
        ["Authorization: Bearer %s", "-H 'authorization: bearer %s'", '"Authorization": "Bearer %s"']
    ) % some(rng, ALNUM + "._~-", 20, 60)


def url_password(rng: random.Random) -> str:
    """Return a URL that logs somebody in."""
    scheme = rng.choice(["postgresql", "redis", "https", "amqp", "mongodb+srv"])
    user = "" if scheme == "redis" else some(rng, string.ascii_lowercase, 3, 8)
    return f"{scheme}://{user}:{real_password(rng)}@{some(rng, string.ascii_lowercase, 3, 9)}.internal:5432/app"


def real_password(rng: random.Random) -> str:
    """Return a password as people and machines choose them, without characters that a URL would escape."""
    return rng.choice([
        some(rng, ALNUM, 8, 24),
        some(rng, ALNUM + "!_*.-", 10, 20) + "z",
        rng.choice(["password", "secret", "token", "get", "config", "changeme", "xxxx", "your", "example"])
        + some(rng, ALNUM, 4, 9),
        rng.choice(["Summer", "Winter", "Berlin", "Dragon"]) + str(rng.randint(1990, 2026)) + rng.choice(["", "!"]),
    ])  # fmt: skip


def named_secret(rng: random.Random) -> str:
    """Return a name and its value in one of the forms in which they are written."""
    if rng.random() < 0.5:
        name = rng.choice(
            ["password", "DB_PASSWORD", "db.password", "userPassword", "passwd", "passphrase", "Passwort"]
        )
        value = real_password(rng)
        if rng.random() < 0.2:
            value = rng.choice(["hunter", "letmein", "correcthorse", "sonnenschein"])
    else:
        name = rng.choice(["api_key", "apiKey", "API-KEY", "client_secret", "SECRET_KEY", "access_token", "auth-token",
                           "aws_secret_access_key", "accountKey", "X-Api-Key", "refreshToken"])  # fmt: skip
        value = some(rng, ALNUM, 16, 44)
    forms = ['{"%s": "%s"}', "%s=%s\n", "%s: %s\n", "%s = '%s'", "export %s=%s", "'%s' => '%s'", '%s := "%s"',
             'config["%s"] = "%s"', "https://api.acme.io/x?%s=%s&page=2", "--%s=%s", 'connect(%s="%s", timeout=3)',
             "<%s>%s</x>", '{\\"%s\\": \\"%s\\"}']  # fmt: skip
    return rng.choice(forms) % (name, value)


POSITIVES: dict[str, list[Maker]] = {
    "email": [email],
    "phone": [international_phone, national_phone, named_phone],
    "us_ssn": [identities.us_ssn],
    "uk_nino": [identities.uk_nino],
    "de_tax_id": [identities.de_tax_id],
    "fr_nir": [identities.fr_nir],
    "es_dni": [identities.es_dni],
    "it_fiscal_code": [identities.it_fiscal_code],
    "pl_pesel": [identities.pl_pesel],
    "nl_bsn": [identities.nl_bsn],
    "in_aadhaar": [identities.in_aadhaar],
    "ch_ahv": [identities.ch_ahv],
    "br_cpf": [identities.br_cpf],
    "credit_card": [credit_card],
    "iban": [iban],
    "private_key": [private_key],
    "jwt": [jwt],
    "api_key": [api_key],
    "bearer_token": [bearer_token],
    "url_password": [url_password],
    "named_secret": [named_secret],
}
