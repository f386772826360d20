"""What counts and what does not, a line each: the decisions that the labelled set does not spell out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_app.detection import KINDS, Detector
from gateway_app.detection.detector import MAX_COUNT

DETECTOR = Detector()
PAGE = Path(__file__).parents[3] / "docs" / "detection.md"
FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
DEVANAGARI = str.maketrans("0123456789", "०१२३४५६७८९")
CARD = "4111 1111 1111 1111"
AWS_KEY = "AKIA" + "Q3EGR7WT2LM4XZ5A"
#: Not to be taken for keys of ours by those who look through sources for some.
GITHUB, STRIPE = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8", "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc"

FOUND = {
    "credit_card": [
        CARD, "4111111111111111", "4111-1111-1111-1111", "4111.1111.1111.1111", "card 378282246310005, exp 12/27",
        "3782 822463 10005", "12 4111 1111 1111 1111 123", "PAN=4111111111111111;", "{'n': 4111111111111111}",
        CARD.translate(FULL_WIDTH), CARD.translate(ARABIC), CARD.translate(DEVANAGARI),
        CARD.replace(" ", "\N{NO-BREAK SPACE}"), CARD.replace(" ", "\N{NARROW NO-BREAK SPACE}"),
        CARD.replace(" ", "\N{NON-BREAKING HYPHEN}"), CARD.replace(" ", "\N{EN DASH}"),
        "4111\N{ZERO WIDTH SPACE}111111111111", "4111\N{SOFT HYPHEN}1111\N{SOFT HYPHEN}1111\N{SOFT HYPHEN}1111",
        "".join(chr(0xE0000 + ord(character)) for character in "4111111111111111"), "卡号4111111111111111。",
        r"paid\n4111111111111111\nthanks",
    ],
    "iban": ["DE89 3704 0044 0532 0130 00", "de89370400440532013000", "GB29-NWBK-6016-1331-9268-19",
             "IBAN:DE89370400440532013000.", "DE89 3704 0044 0532 0130 00 is mine", "ＤＥ８９370400440532013000"],
    "email": ["bob@example.com", "<Ann.O'Neil+x@mail.acme.co.uk>", "mailto:bob@acme.io", "?to=bob%40acme.io&x=1",
              "bob@acme.io.", "“bob@acme.io”", r"\nbob@acme.io\n", "josé@acme.io", "ｂｏｂ＠acme.io"],
    "phone": ["+44 20 7946 0958", "+1 (212) 555-2368", "+49 (0)30 901820", "+12125552368", "(212) 555-2368",
              "212-555-2368", "06 12 34 56 78", "020 7946 0958", "Tel.: 030/901820", '"phone": "2125552368"',
              "call me at 2125552368", "+1.2125552368", "+44 20 7946 0958 2 lines"],
    "us_ssn": ["536-90-4399", "SSN: 536904399", '"ssn": "536 90 4399"'],
    "named_secret": [
        '{"passwords": ["hunter2", "sesame"]}', "DB_PASS=hunter2", '{"user": "bob", "pass": "hunter2"}',
        'token: "' + "a1b2" * 100 + '"', "password: 12345678",
        '{"password": "x"}', '{"db": {"Password": "hunter2"}}', "DB_PASSWORD=letmein", "password: hunter2",
        "password: correcthorse\n", "changeme2024! is no placeholder: password=changeme2024!", "password=passwordless9",
        "SECRET_KEY=getrich-2024", "password: config2Zq", "token: secretive-8Zk1qP", 'api_key: "your-dog-is-1982"',
        "password=xxxxA8f3", "--password hunter", "--db-password hunter2", "mysql -password 's3 cret'",
        "<password>hunter2</password>", r'{\"password\": \"hunter2\"}', 'config["password"] = "hunter2"',
        "The password is hunter2.", "pwd='日本語のパスワード'", "Passwort: geheim99", "aws_secret_access_key = wJalrXUtnFEMIK7MDENG",
        "?api_key=8f3a9b2c1d&x=1", "X-Api-Key: 8f3a9b2c1d", "secrets: {token: 8f3a9b2c1d}", "ｐａｓｓｗｏｒｄ：hunter2",
    ],
    "api_key": [AWS_KEY, f"key={AWS_KEY}", GITHUB, STRIPE, f"https://x.io/?k={STRIPE}&y=1", f"log:\\n{GITHUB}\\n"],
    "bearer_token": ["Authorization: Bearer 8f3a9b2c1d0e8f3a9b2c", "authorization: Basic dXNlcjpodW50ZXIy"],
    "url_password": ["postgresql://app:hunter2@db/app", "redis://:hunter2@cache:6379/0", r"https:\/\/a:hunter2@x.io"],
    "private_key": ["-----BEGIN RSA PRIVATE KEY-----\nMIIE", "-----BEGIN PGP PRIVATE KEY BLOCK-----"],
}  # fmt: skip
NOTHING = [
    "", " ", "\x00", "4111 1111 1111 1112", "0.4111111111111111", "x4111111111111111", "4111111111111111a",
    "550e8400-e29b-41d4-a716-446655440000", "4111 1111 1111 1111 1111", "0000 0000 0000 0000", "DE88 3704 0044 0532 0130 00",
    "000-12-3456", "666-12-3456", "2026-11-25 21:24:05.123456+01:00", "20261125T212405Z", "192.168.100.200:8080",
    "1.2.3-rc.4+build.12345", "+35.898847, -176.976014", "@app.route('/')", "a @ b.T", "image@2x.png", "react@18.2.0",
    "git@github.com:acme/app.git", "https://bob@acme.io/", "call 2026-11-25", "hotel 2125552368", '"phone_id": 2125552368',
    "01 02 03 04 05 06 07 08", "password: ${DB_PASSWORD}", 'password: "<your-key>"', "password=changeme", "PASSWORD=xxxx",
    "password: ****", "password: [REDACTED]", "api_key: your-api-key-here", "password: null", "password={{ password }}",
    "password=%(password)s", "password: /run/secrets/db", "password: ••••••", "Password: must be long enough",
    "password=args.password", "token = next(tokens)", '{"token": " the", "logprob": -0.1}', "max_tokens: 100000",
    "tokens: 12345678", '"password": {"type": "string"}', "def f(password: str) -> None:", "Bearer <token>",
    "Bearer of good news for everybody", "postgresql://app:${PW}@db/app", "https://x.io:8443/a@b", "AKIAIOSFODNN7EXAMPLE",
    "sk-toggleable-content-label-arrow", "-----BEGIN PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----", "base-passwd for Debian",
    "PWD=/home/ann/work", 'password=""', '{"password": ["This field is required."]}', "pass: 1234, fail: 12", "task-sk-1", "86095742719", "bare 536904399", "eyJhbGciOiJIUzI1NiJ9",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_it_is_found(kind: str, text: str) -> None:
    """Once, as this kind, and as nothing else."""
    assert DETECTOR.scan([text]).counts == {kind: 1}


@pytest.mark.parametrize("text", NOTHING)
def test_it_is_nothing(text: str) -> None:
    """Text that only looks like something."""
    findings = DETECTOR.scan([text])
    assert findings.counts == {}
    assert not findings.private
    assert not findings.sensitive


def test_what_the_page_says_is_missed_is_missed() -> None:
    """If it is found one day, the page must no longer say so."""
    section = PAGE.read_text("utf-8").partition("## What it does not find")[2].partition("## Cost")[0]
    missed = re.findall(r"^\| `(.+)` \|", section, re.MULTILINE)
    assert len(missed) > 5
    assert {text: counts for text in missed if (counts := DETECTOR.scan([text]).counts)} == {}


def test_private_and_sensitive_are_told_apart() -> None:
    """A person's data is private, what opens something is sensitive, and a text may hold both."""
    person, secret = DETECTOR.scan(["bob@acme.io"]), DETECTOR.scan([AWS_KEY])
    assert (person.private, person.sensitive) == (True, False)
    assert (secret.private, secret.sensitive) == (False, True)
    both = DETECTOR.scan(["bob@acme.io", AWS_KEY, "ann@acme.io"])
    assert both.counts == {"email": 2, "api_key": 1}
    assert both.private
    assert both.sensitive


def test_nothing_is_found_across_two_texts() -> None:
    """Two messages are two texts, although they are scanned at once."""
    assert DETECTOR.scan(["4111 1111 ", "1111 1111"]).counts == {}
    assert DETECTOR.scan(["password:", "hunter2"]).counts == {}
    assert DETECTOR.scan([]).counts == {}


def test_findings_hold_no_text() -> None:
    """They go into audit records."""
    shown = repr(DETECTOR.scan([f"{CARD} bob@acme.io {AWS_KEY} password=hunter2"]))
    assert not any(part in shown for part in ("4111", "bob", "acme", "AKIA", "hunter"))
    assert "credit_card" in shown


def test_counts_end_somewhere() -> None:
    """A text of nothing but addresses is no reason to count them all."""
    assert DETECTOR.scan(["a@acme.io " * (2 * MAX_COUNT)]).counts == {"email": MAX_COUNT}


parts = st.sampled_from([text for texts in FOUND.values() for text in texts] + NOTHING)


@given(st.lists(st.one_of(parts, st.text())))
def test_any_text_is_taken(texts: list[str]) -> None:
    """Surrogates, control characters and whatever else a str may hold: known kinds and positive numbers come out."""
    counts = DETECTOR.scan(texts).counts
    assert counts.keys() <= KINDS.keys()
    assert all(0 < count <= MAX_COUNT for count in counts.values())


@given(st.text(), st.sampled_from([CARD, AWS_KEY, "bob@acme.io", "DE89370400440532013000"]), st.text())
def test_what_stands_around_it_does_not_hide_it(before: str, value: str, after: str) -> None:
    """Whatever is on the lines before and after."""
    assert DETECTOR.scan([f"{before}\n{value}\n{after}"]).counts


def test_lone_surrogates_are_text_too() -> None:
    """JSON can spell them."""
    assert DETECTOR.scan(["\ud800 bob@acme.io \udfff"]).counts == {"email": 1}
