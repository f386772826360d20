"""Values that a name says are secret: `DB_PASSWORD=…`, `"api_key": "…"`, `<password>…</password>`, `--token …`.

The name is found first, then what sets it: a sign of assignment in environment files, code, YAML, JSON, XML, query
strings or headers, the word `is`, or the blank after an option of a command. Then the value is judged. In quotation
marks it is taken as it is; without, code has to be told from text (`password=args.password`, `token = next(tokens)`),
and prose from a value (`Password: must have eight characters`).

A password may be any word, so after a password's name nearly anything counts that is no placeholder. A token or key
must have a digit and eight characters, as all that are made by machines have: `"token": " the"` is a model's word.
"""

from __future__ import annotations

import re

from gateway_app.detection.placeholders import is_placeholder
from gateway_app.detection.rule import Locate, Rule, Span

#: Names, by what those on a line have in common.
_PASSWORDS = {
    b"pass": (
        b"password", b"passwd", b"passphrase", b"passwort", b"passcode", b"mot de passe", b"mot_de_passe",
        b"db_pass", b"user_pass", b"smtp_pass", b"admin_pass", b"'pass'", b'"pass"',
    ),
    b"pwd": (b"pwd",),
    b"kennwort": (b"kennwort",),
    b"contrase": (b"contrasena",),
}  # fmt: skip
_KEYS = {
    b"key": (
        b"api_key", b"apikey", b"api-key", b"api key", b"access_key", b"accesskey", b"access-key", b"private_key",
        b"privatekey", b"private-key", b"encryption_key", b"encryptionkey", b"signing_key", b"signingkey",
        b"master_key", b"account_key", b"accountkey", b"auth_key", b"authkey", b"sharedkey",
    ),
    b"secret": (b"secret",),
    b"token": (b"token",),
    b"credential": (b"credential",),
    b"x-auth": (b"x-auth",),
}  # fmt: skip
_MIN_KEY = 8
_MIN_BARE_PASSWORD = 3
#: No value is looked at further than this, in bytes.
_LONGEST = 256
#: More of the name, what closes it, what sets it, and the value, or a list's first, in one of four forms.
#: What stands in quotation marks must end with one, unless it is too long to be looked at to its end.
_REST = (
    rb"(?:[_.-]?(?:access|key|value|text|string|plain|base64|s(?=[\"' ]{0,2}[:=])))?(?:[_.-]?key)?"
    rb"(?:[\"'`\]]{0,2}[ \t]{0,8}(?P<sign>:=|=>|=(?!=)|:(?![:/]))[ \t]{0,8}|(?P<xml>>)|(?P<word> is:? )|%b)"
    rb"(?:(?P<list>\[\s{0,40})?(?:f?\"(?P<double>[^\"\n]{1,%d}+)(?:\"|(?=[^\n]))"
    rb"|'(?P<single>[^'\n]{1,%d}+)(?:'|(?=[^\n]))|`(?P<back>[^`\n]{1,%d}+)(?:`|(?=[^\n])))"
    rb"|(?P<bare>[^\s\"'`,;&<>]{1,%d}))"
)
#: After the option of a command, which a dash tells, a blank sets the value, unless another option follows.
_OPTION = rb"(?<=-%b)(?P<option> {1,4})(?!-)"
#: A value that is code: an attribute, a call or an index, a name and what closes the call that it is an argument of.
_CODE = re.compile(
    rb"[A-Za-z_$@&*][A-Za-z_$]*(?:(?:\.|->|::)[A-Za-z_]+)+|[\w.$]+[(\[{].*|[A-Za-z_]+[)\]}]+|[{[(@:|>&*].*"
)
#: A key has a digit, a letter and no blank.
_KEY = re.compile(rb"(?=[^0-9]*[0-9])(?=[^A-Za-z]*[A-Za-z])[^\s]{%d,}" % _MIN_KEY)
_CLOSES = re.compile(rb"[)\]}]")
_ODD = re.compile(rb"[0-9!@#$%^*+=~?/\\]|[a-z][A-Z]")


def _value(match: re.Match[bytes]) -> tuple[str, Span]:
    """Return the name of the group that matched the value, and where."""
    for group in ("double", "single", "back", "bare"):
        if match[group] is not None:
            return group, match.span(group)
    raise AssertionError("a pattern of this module has no value")


def _locate(*, password: bool) -> Locate:
    def locate(plain: bytes, match: re.Match[bytes]) -> Span | None:
        group, (start, end) = _value(match)
        value = plain[start:end]
        return (start, end) if _counts(value, plain, match, bare=group == "bare", password=password) else None

    return locate


def _counts(value: bytes, plain: bytes, match: re.Match[bytes], *, bare: bool, password: bool) -> bool:
    if bare:
        # What closes the sentence, call or object that the value stands in; a question mark may be a foreign full stop.
        value = value.rstrip(b"\\?.,:)]}")
        if len(value) < _MIN_BARE_PASSWORD or _CODE.fullmatch(value) or _CODE.fullmatch(match["bare"]):
            return False
    inner = _CLOSES.split(value, maxsplit=1)[0] if bare else value.strip()
    if is_placeholder(value) or is_placeholder(inner):
        return False
    if match["list"] and b" " in inner:
        return False  # Messages about a field are often lists, too.
    if not password:
        return _KEY.fullmatch(inner) is not None
    return not bare or _ODD.search(value) is not None or _stands_alone(value, plain, match)


def _stands_alone(value: bytes, plain: bytes, match: re.Match[bytes]) -> bool:
    """Tell whether a plain word without quotation marks is a value: if nothing follows, and not if a sentence does."""
    start, end = match.span("bare")
    before = plain[max(0, match.start() - 2) : match.start()]
    if match["option"] and before[:1].isalnum():
        return False  # `base-passwd for Debian`, not `--passwd hunter`.
    if match["word"] or plain[end : end + 1] in {b",", b")"}:
        return False
    spaced = match["sign"] is not None and plain[start - 1 : start] == b" "
    if not spaced:
        return True
    # `password = db_password` is code.
    named = match["sign"] == b"=" and b"_" in value
    return not named and plain[end : end + 3].lstrip(b" \t\r")[:1] in {b"", b"\n", b"#"}


def _rule(gate: bytes, word: bytes, *, password: bool) -> Rule:
    rest = _REST % (_OPTION % word, *(_LONGEST,) * 4)
    return Rule("named_secret", "lower", word, re.compile(word + rest), _locate(password=password), gate)


RULES: tuple[Rule, ...] = (
    *(_rule(gate, word, password=True) for gate, words in _PASSWORDS.items() for word in words),
    *(_rule(gate, word, password=False) for gate, words in _KEYS.items() for word in words),
)
