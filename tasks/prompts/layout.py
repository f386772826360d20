"""Where a profile ends and a task begins, in token ids.

The chat template is rendered once with two marks in place of the system text and the user text. Cut at its control
tokens, the result is a list of ids and stretches of text with the marks in them. Everything up to the last control
token before the user's mark is the static part; its ids are computed once per profile. What follows is the dynamic
part: for each request the user text takes the mark's place and each stretch is encoded as plain text, so that no text
can become a control token, and no token can span the border between the two parts.

That joining must give what encoding the whole prompt would give. It does for most templates, and is not taken on
trust: `PromptLayout` compares both on probes, and where they differ it encodes the whole prompt instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from tasks.prompts.tokenizer import ModelTokenizer

#: Marks survive any template: plain letters, not likely in one, without blanks that a template could trim.
_SYSTEM, _USER = "qzxSYSTEMTEXTxzq", "qzxUSERTEXTxzq"

#: Text that is known to upset naive joins: blanks at either end, merges over the border, scripts, template syntax.
PROBES = (
    "What is the status?",
    "\n\nLeading blank lines",
    "Trailing spaces and lines  \n\n",
    " one leading space",
    "\tTab",
    "'s 1234 ...",
    "```\ncode\n```",
    "{{ context }} {% if x %} %s {0}",
    "user\nassistant\nsystem",
    "Ünïcödé 漢字 🙂",
    "x",
)


class PromptLayout:
    """The token ids of one profile's prompts.

    `static_token_ids` is the part every prompt starts with. `joinable` tells whether joined ids equalled the whole
    encoding on all probes; if not, `static_token_ids` is empty and every prompt is encoded whole.
    """

    def __init__(self, tokenizer: ModelTokenizer, static_text: str) -> None:
        self._tokenizer = tokenizer
        self._trims = _trims(tokenizer)
        self._static_text = self._normal(static_text)
        parts = tokenizer.split(tokenizer.render(_messages(_SYSTEM, _USER)))
        border = _border(parts)
        self._head, self._tail = parts[:border], parts[border:]
        self.static_token_ids = tuple(self._fill(self._head, ""))
        self.joinable = all(self._join(probe) == self._whole(probe) for probe in PROBES)
        if not self.joinable:
            self.static_token_ids = ()

    def dynamic_token_ids(self, user_text: str) -> list[int]:
        """Return the ids that follow `static_token_ids` when the user says `user_text`."""
        if self.joinable:
            return self._fill(self._tail, self._normal(user_text))
        if self._tokenizer.has_control_tokens(user_text) or self._tokenizer.has_control_tokens(self._static_text):
            # Encoding the whole would obey them. Piece by piece they stay text, at the price of a blank here and there.
            return self._join(user_text)
        return self._whole(user_text)

    def _join(self, user_text: str) -> list[int]:
        text = self._normal(user_text)
        return self._fill(self._head, text) + self._fill(self._tail, text)

    def _whole(self, user_text: str) -> list[int]:
        rendered = self._tokenizer.render(_messages(self._static_text, user_text))
        return self._tokenizer.encode_trusted(rendered)

    def _fill(self, parts: Sequence[int | str], user_text: str) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                # The marks are replaced in one pass, so that text which spells a mark is left as it is.
                before, mark, after = part.partition(_USER)
                text = before.replace(_SYSTEM, self._static_text) + (user_text if mark else "") + after
                ids.extend(self._tokenizer.encode_plain(text))
        return ids

    def _normal(self, text: str) -> str:
        return text.strip() if self._trims else text


def _messages(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _trims(tokenizer: ModelTokenizer) -> bool:
    """Tell whether the template strips blanks around what it is given; then the layout must do so too."""
    return f"  {_USER}  " not in tokenizer.render(_messages(_SYSTEM, f"  {_USER}  "))


def _border(parts: Sequence[int | str]) -> int:
    """Return the index of the first part after the last control token before the user's mark."""
    user = next((index for index, part in enumerate(parts) if isinstance(part, str) and _USER in part), 0)
    controls = [index for index in range(user) if isinstance(parts[index], int)]
    return controls[-1] + 1 if controls else 0
