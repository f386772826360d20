"""The profiles in profiles/ are tokenised once in a test process, not anew with each of its thousand gateways.

That took most of the time in which a gateway is made. A layout is never changed once it is made, and the same profile has
the same one with the same tokenizer; whatever else a test writes into a profile is tokenised as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway_app.profiles import active
from gateway_app.profiles.shipped import shipped_inheritance
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import read_profiles
from tasks.prompts.sharing import Said
from tasks.prompts.tokenizer import ModelTokenizer


@contextmanager
def tokenised_once(directory: Path) -> Iterator[None]:
    """Have gateways share the layouts of the profiles in this folder, and that of prompts that have no profile."""
    agents = read_profiles(directory)
    inherited = shipped_inheritance(agents)
    texts = {None, *(inherited[name].before(profile).text for name, profile in agents.items())}
    made: dict[str, PromptLayout] = {}

    def layout(
        tokenizer: ModelTokenizer,
        text: str | None,
        examples: Sequence[tuple[str, str]] = (),
        inner: Sequence[Said] = (),
    ) -> PromptLayout:
        if text not in texts:
            return PromptLayout(tokenizer, text, examples, inner)
        model = (tokenizer.fingerprint, tokenizer.template_hash, tokenizer.date, tokenizer._variables)
        name = repr((model, text, examples, inner))
        if name not in made:
            made[name] = PromptLayout(tokenizer, text, examples, inner)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(active, "PromptLayout", layout)
        yield
