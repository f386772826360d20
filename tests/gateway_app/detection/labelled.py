"""Texts of which it is known what is in them: values of each kind among other words, and what only looks like one.

Positives stand in a sentence, a log line, JSON, YAML, a table or a list. Negatives are numbers with wrong checksums, the
identifiers, times and addresses that logs are full of, placeholders of manuals, and code.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from tests.gateway_app.detection.identities import digits, grouped
from tests.gateway_app.detection.values import POSITIVES, Maker, card_number, iban, luhn_digit


@dataclass(frozen=True)
class Sample:
    """A text and the one kind that is in it, once; None if there is nothing."""

    text: str
    kind: str | None
    family: str


#: What stands around a value. Neutral, so that no word of it names a kind.
FRAMES = (
    "%s", "%s", "Please look at %s and tell me what to do.", "Customer wrote: %s", "2026-11-25T21:24:05Z INFO got %s",
    '{"note": "%s"}', "- item: %s\n- state: open\n", "| 17 | %s | open |", "(%s)", "see <%s>, thanks",
    "value: %s\nnext line", "%s.", "%s, and so on", "x\t%s\ty", "[%s](#4)", "%s; 12/27", "* %s *", "*%s*", "Who is %s?",
    "(ref %s, 2nd attempt)", "2 × %s", "%s 3 times", "'%s'", "first line\\n%s\\nlast line", "“%s”", "会议室 %s。",
)  # fmt: skip


def framed(rng: random.Random, value: str) -> str:
    """Return a text around the value that does not change what it is."""
    quoted = '"' in value or "\n" in value or "<" in value or "`" in value or "'" in value
    return "Note. " * rng.randrange(3) + rng.choice(FRAMES[2:5] if quoted else FRAMES) % value


def positives(seed: int, count: int) -> Iterator[Sample]:
    """Give `count` texts of each kind."""
    for kind, makers in POSITIVES.items():
        rng = random.Random(f"{seed}/{kind}")
        for _ in range(count):
            make = rng.choice(makers)
            yield Sample(framed(rng, make(rng)), kind, make.__name__)


def wrong_card(rng: random.Random) -> str:
    """Return a card's number with a wrong last digit."""
    number = card_number(rng)
    return number[:-1] + str((int(number[-1]) + rng.randint(1, 9)) % 10)


def wrong_visa(rng: random.Random) -> str:
    """Return sixteen digits of one issuer, of which the last is wrong."""
    body = "4" + digits(rng, 14)
    return body + str((int(luhn_digit(body)) + rng.randint(1, 9)) % 10)


def wrong_iban(rng: random.Random) -> str:
    """Return an account with wrong check digits."""
    text = iban(rng)
    return text[:2] + f"{(int(text[2:4]) + rng.randint(1, 90)) % 97:02d}" + text[4:]


def isbn(rng: random.Random) -> str:
    """Return a book's number, whole or in groups."""
    number = "978" + digits(rng, 10)
    return rng.choice([f"ISBN {number}", f"ISBN 978-{number[3]}-{number[4:8]}-{number[8:12]}-{number[12]}"])


def placeholder(rng: random.Random) -> str:
    """Return a name with what stands for a value in manuals, templates and cleaned logs."""
    name = rng.choice(["password", "api_key", "DB_PASSWORD", "client_secret", "access_token", "secret"])
    value = rng.choice([
        "${DB_PASSWORD}", "$PASSWORD", "<your-key>", "<password>", "changeme", "CHANGE_ME", "xxxx", "XXXXXXXX", "********",
        "****", "your-api-key-here", "YOUR_API_KEY", "your_password", "[REDACTED]", "REDACTED", "{{ password }}", "...",
        "null", "None", "true", "%PASSWORD%", "{password}", "/run/secrets/db_password", "placeholder", "todo", "string",
    ])  # fmt: skip
    return rng.choice(['"%s": "%s"', "%s=%s", "%s: %s", "%s = '%s'"]) % (name, value)


def code(rng: random.Random) -> str:
    """Return code or prose that names a secret and tells none."""
    return rng.choice([
        "password=args.password", "token = next(tokens)", "password = getpass()", "api_key=os.environ['API_KEY']",
        "def login(user: str, password: str) -> Token:", "const token = await getToken(user);", "if password == expected:",
        '"password": {"type": "string", "minLength": 8}', "password: str = Field(min_length=8)", "The token is invalid.",
        "Password: must have eight characters or more", "the password is required for this", "max_tokens: 4096",
        '{"token": " the", "logprob": -0.12}', '"total_tokens": 1234, "prompt_tokens": 99', "token_type=bearer",
        "SELECT password FROM users", "secret: a thing that few know", "Password reset was asked for at 12:30",
        "Client(password=db_password, host=host)", "tokens: 512", "keyboard: qwertz", "secretName: db-credentials",
        "self.token = token", "password: $(cat file)", "export TOKEN=$(vault read x)", "tokenizer: SmolLM2-135M",
    ])  # fmt: skip


NEGATIVES: dict[str, Maker] = {
    "card, wrong checksum": wrong_card,
    "card, wrong checksum, grouped": lambda rng: grouped(wrong_visa(rng), (4, 4, 4, 4), rng.choice(" -")),
    "IBAN, wrong checksum": wrong_iban,
    "UUID": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
    "SHA-256": lambda rng: f"{rng.getrandbits(256):064x}",
    "git SHA": lambda rng: f"commit {rng.getrandbits(160):040x}",
    "short SHA": lambda rng: f"at {rng.getrandbits(32):08x}",
    "timestamp": lambda rng: f"2026-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d} {rng.randrange(24):02d}:{rng.randrange(60):02d}:{rng.randrange(60):02d}.{digits(rng, 6)}+01:00",
    "compact timestamp": lambda rng: f"2026{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}T{rng.randrange(24):02d}{rng.randrange(60):02d}00Z",
    "epoch": lambda rng: str(1_760_000_000_000_000_000 + rng.randrange(10**16))[: rng.choice([10, 13, 16, 19])],
    "IP": lambda rng: ".".join(str(rng.randrange(256)) for _ in range(4)) + rng.choice(["", ":8080", "/24"]),
    "IPv6": lambda rng: ":".join(f"{rng.getrandbits(16):x}" for _ in range(8)),
    "version": lambda rng: f"v{rng.randrange(20)}.{rng.randrange(99)}.{rng.randrange(999)}-rc.{rng.randrange(9)}+build.{rng.randrange(9999)}",
    "price": lambda rng: rng.choice(["€ {:,.2f}", "{:,.2f} USD", "${:,.2f}"]).format(rng.random() * 10**7),
    "fraction": lambda rng: f"{rng.random():.16f}",
    "ISBN": isbn,
    "phone-like id": lambda rng: rng.choice(["ticket {}", "PO-{}", "id={}", "#{}", "case {}", '"phone_id": {}']).format(digits(rng, rng.choice([7, 9, 10, 11, 12]))),
    "dotted id": lambda rng: f"{rng.randint(100, 199)}.{digits(rng, 3)}.{digits(rng, 4)}",
    "date range": lambda rng: f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.2025-{rng.randint(1, 28):02d}.12.2026",
    "decorator": lambda rng: rng.choice(["@app.route('/users')", "@pytest.mark.parametrize", "x @ y", "a@b", "@user said hi", "C = A@B.T", "react@18.2.0", "image@2x.png", "git@github.com:acme/app.git"]),
    "number list": lambda rng: " ".join(str(rng.randrange(100)) for _ in range(12)),
    "hex dump": lambda rng: " ".join(f"{rng.randrange(256):02x}" for _ in range(16)),
    "matrix": lambda rng: "\n".join(" ".join(f"{rng.randrange(10**4):04d}" for _ in range(6)) for _ in range(3)),
    "placeholder": placeholder,
    "code and prose": code,
    "path": lambda rng: f"/var/log/app-{digits(rng, 8)}/part-{digits(rng, 5)}.json.gz",
    "URL without password": lambda rng: f"https://api.acme.io:8443/v1/items/{digits(rng, 9)}?page={rng.randrange(99)}&at={digits(rng, 10)}",
    "key's documentation": lambda rng: rng.choice(["AKIAIOSFODNN7EXAMPLE", "sk-...", "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "Bearer <token>", "Bearer YOUR_ACCESS_TOKEN", "Bearer $ACCESS_TOKEN", "-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "sk-toggleable-content-label"]),
    "SSN-like part number": lambda rng: f"part {rng.choice(['000', '666', '987'])}-{digits(rng, 2)}-{digits(rng, 4)}",
    "diff": lambda rng: f"@@ -{rng.randrange(999)},7 +{rng.randrange(999)},9 @@ def f():",
    "coordinates": lambda rng: f"+{rng.random() * 90:.6f}, -{rng.random() * 180:.6f}",
    "offset": lambda rng: f"+{rng.randrange(10**6)} bytes, +{rng.randrange(100)}%",
}  # fmt: skip


def negatives(seed: int, count: int) -> Iterator[Sample]:
    """Give `count` texts of each family in which there is nothing."""
    for family, make in NEGATIVES.items():
        rng = random.Random(f"{seed}/{family}")
        for _ in range(count):
            yield Sample(framed(rng, make(rng)), None, family)
