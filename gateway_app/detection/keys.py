"""Keys and tokens that say what they are: by a prefix that their issuer chose so that they can be found, or by form.

The prefixes are those of services that publish them. A key that its issuer marks as an example, as AWS does in its
manuals, is none.
"""

from __future__ import annotations

import re

from gateway_app.detection.placeholders import is_placeholder
from gateway_app.detection.rule import Rule, rule

#: No key is looked at further than this, in bytes.
_LONGEST = 400
_MIN_DIGITS = 3
_MIN_BEARER = 16
_WORD = rb"[0-9A-Za-z_-]"
#: What keys begin with, and what must follow.
_PREFIXES: tuple[tuple[bytes, bytes], ...] = (
    (b"AKIA", rb"[A-Z2-7]{16}"),
    (b"ASIA", rb"[A-Z2-7]{16}"),
    *((prefix, rb"[0-9A-Za-z]{36,255}") for prefix in (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_")),
    (b"github_pat_", rb"[0-9A-Za-z]{22}_[0-9A-Za-z]{59}"),
    (b"glpat-", rb"[0-9A-Za-z_-]{20,64}"),
    (b"glrt-", rb"[0-9A-Za-z_-]{20,64}"),
    (b"gldt-", rb"[0-9A-Za-z_-]{20,64}"),
    (b"xox", rb"[abeoprs]-[0-9A-Za-z-]{20,250}"),
    (b"xapp-", rb"[0-9]-[0-9A-Za-z-]{20,250}"),
    (b"hooks.slack.com/services/", rb"T[0-9A-Z]{6,14}/B[0-9A-Z]{6,14}/[0-9A-Za-z]{20,32}"),
    (b"AIza", rb"[0-9A-Za-z_-]{35}"),
    (b"GOCSPX-", rb"[0-9A-Za-z_-]{28}"),
    (b"ya29.", rb"[0-9A-Za-z_-]{30,300}"),
    *((prefix, rb"(?:live|test)_[0-9A-Za-z]{16,250}") for prefix in (b"sk_", b"rk_")),
    (b"whsec_", rb"[0-9A-Za-z+/=]{24,64}"),
    (b"npm_", rb"[0-9A-Za-z]{36}"),
    (b"pypi-AgE", rb"[0-9A-Za-z_-]{50,250}"),
    (b"hf_", rb"[0-9A-Za-z]{34,40}"),
    (b"SG.", rb"[0-9A-Za-z_-]{22}\.[0-9A-Za-z_-]{43}"),
    (b"dop_v1_", rb"[0-9a-f]{64}"),
    (b"shpat_", rb"[0-9a-fA-F]{32}"),
    (b"dapi", rb"[0-9a-f]{32}"),
    (b"mq_", rb"[0-9A-Za-z_-]{43}"),
)


def _is_real(found: bytes) -> bool:
    return not found.endswith(b"EXAMPLE") and len(set(found)) > _MIN_DIGITS * 2


def _is_model_key(found: bytes) -> bool:
    """Tell a key that begins with `sk-`, as those of many model providers do, from a name that begins so."""
    return sum(found.count(digit) for digit in b"0123456789") >= _MIN_DIGITS and _is_real(found)


def _is_token(found: bytes) -> bool:
    return any(digit in found for digit in b"0123456789") and not is_placeholder(found)


def _prefixed(prefix: bytes, rest: bytes) -> Rule:
    literal = re.escape(prefix)
    # Nothing of a longer word: the part before may be anything but a letter, a digit, an underscore or a dash.
    pattern = literal + rb"(?<!" + _WORD + literal + rb")" + rest + rb"(?!" + _WORD + rb")"
    return rule("api_key", "plain", prefix, pattern, _is_real, gate=b"_" if b"_" in prefix else None)


RULES: tuple[Rule, ...] = (
    rule("private_key", "plain", b"PRIVATE KEY-----", rb"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY-----"),
    rule("private_key", "plain", b"PRIVATE KEY BLOCK-----", rb"-----BEGIN PGP PRIVATE KEY BLOCK-----"),
    rule(
        "jwt",
        "plain",
        b"eyJ",
        rb"eyJ(?<!" + _WORD + rb"eyJ)[0-9A-Za-z_-]{10,2000}+\.eyJ[0-9A-Za-z_-]{10,8000}+\.[0-9A-Za-z_-]{16,2000}+",
    ),
    *sorted((_prefixed(prefix, rest) for prefix, rest in _PREFIXES), key=lambda found: found.gate),
    rule("api_key", "plain", b"sk-", rb"sk-(?<!" + _WORD + rb"sk-)[0-9A-Za-z_-]{20,%d}+" % _LONGEST, _is_model_key),
    rule(
        "url_password",
        "plain",
        b"://",
        rb"://[^\s/:@\"'<>]{0,64}+:([^\s/@\"'<>]{1,128}+)@",
        lambda found: not is_placeholder(found),
    ),
    rule(
        "bearer_token",
        "lower",
        b"bearer ",
        rb"bearer (?<![0-9a-z_]bearer )([0-9a-z._~+/-]{%d,%d}+=*)" % (_MIN_BEARER, _LONGEST),
        _is_token,
    ),
    rule(
        "bearer_token",
        "lower",
        b"basic ",
        rb"authorization[\"']?[:=] ?[\"']?basic ([0-9a-z+/]{8,%d}+=*)" % _LONGEST,
        lambda found: not is_placeholder(found),
    ),
)
