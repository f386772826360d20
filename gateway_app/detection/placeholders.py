"""Tells what stands in a secret's place from a secret: variables, masks, and the words of manuals.

The whole value must be one: `changeme` is a placeholder and `changeme2024!` is somebody's password.
"""

from __future__ import annotations

import re

_WORDS = (
    "change[ _.-]?(?:me|this|it)|place[ _-]?holder|example|sample|dummy|fake|redacted|hidden|masked|removed|filtered|"
    "censored|sensitive|secret|password|passwd|passphrase|pass|pwd|token|key|api[ _-]?key|credentials?|todo|tbd|fixme|"
    "none|null|nil|undefined|true|false|yes|no|on|off|required|optional|unset|empty|missing|invalid|incorrect|wrong|"
    "expired|unknown|disabled|enabled|prompt|ask|str|string|text|bytes|varchar|char|any|object|number|value|default|"
    "foo|bar|baz|foobar|abc|test|user|username|bearer|basic|n/a|not[ _-]set|my[ _-]?(?:password|secret|token|key)|"
    "(?:my|your|the|some|an?|insert|enter|put|replace|add|paste)(?:[ _.-]?(?:your|own|real|actual|new|secure|strong|"
    "secret|api|access|auth|client|private|db|database|admin|user|account|service|openai|github|aws|here|with|me|"
    "password|passwd|pass|token|key|credentials?|value)){1,8}"
)
_PLACEHOLDER = re.compile(
    rb"(?i)(?:"
    rb"\$\{.*|\$\(.*|\$[a-z_]\w*|%\w+%|%\(\w+\)s|(?:%[sdr][:/ ,-]?)+|\?|#\{.*|\{\{?.*|<.*|\[[^\]]*\]?|\(.*|"  # variables and templates
    rb"x{3,}|[\w:.-]{0,4}\*{3,}[\w:.-]{0,4}|\*+|\.{2,}|-+|_+|#+|0+|"  # masks
    rb"!(?:secret|vault|ref|env|sub|getatt|join)\b.*|enc\[.*|(?:vault|file|env|ref|arn|ssm|secretref|sops|op):.*|"
    rb"/[\w.-]+(?:/[\w.-]+)+|~/.*|" + _WORDS.encode() + rb")"
)
_LONGEST = 256


def is_placeholder(value: bytes) -> bool:
    """Tell whether `value`, all of it, is what a manual, a template or a log filter writes instead of a secret."""
    return _PLACEHOLDER.fullmatch(value[:_LONGEST].strip()) is not None or not value.strip()
