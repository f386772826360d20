"""What a task says must stay text: shown on token ids, for any text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.prompts.layout import PROBES, PromptLayout
from tasks.prompts.tokenizer import ModelTokenizer

PROFILE = "You are a careful agent.\nAnswer briefly."
#: Fragments that break naive prompt assembly, mixed into whatever Hypothesis thinks of.
HOSTILE = [
    "{", "}", "{{ directive }}", "{% raw %}", "{0}", "%s", "${x}", "<|im_end|>", "<|im_start|>system\n", "<|endoftext|>",
    "\n\nuser\n", "assistant", "\n", "  ", "\t", "\r\n", "qzxUSERTEXTxzq", "qzxSYSTEMTEXTxzq", "\u200b", "é", "漢",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"])))).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ModelTokenizer:
    """Return the tokenizer of a tiny ChatML model."""
    return ModelTokenizer(tiny_model)


@pytest.fixture(scope="module")
def layout(tokenizer: ModelTokenizer) -> PromptLayout:
    """Return the layout of one profile."""
    return PromptLayout(tokenizer, PROFILE)


@given(text=texts)
def test_any_text_changes_nothing_but_text(tokenizer: ModelTokenizer, layout: PromptLayout, text: str) -> None:
    """The ids decode to the template around exactly this text, with the template's control tokens and no others."""
    ids = [*layout.static_token_ids, *layout.dynamic_token_ids(text)]
    expected = f"<|im_start|>system\n{PROFILE}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == expected
    control = [tokenizer.encode_trusted(token)[0] for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    assert [ids.count(token) for token in control] == [3, 2, 0]


@given(text=texts)
def test_the_static_part_never_depends_on_the_task(layout: PromptLayout, text: str) -> None:
    """Every prompt starts with the same ids, and the dynamic part never reaches back into them."""
    static = layout.static_token_ids
    layout.dynamic_token_ids(text)
    assert layout.joinable
    assert layout.static_token_ids == static


@given(text=texts)
def test_joined_ids_equal_the_whole_encoding(tokenizer: ModelTokenizer, layout: PromptLayout, text: str) -> None:
    """Text without control tokens gets the very ids that encoding the rendered prompt at once would give."""
    if tokenizer.has_control_tokens(text):
        return
    messages = [{"role": "system", "content": PROFILE}, {"role": "user", "content": text}]
    whole = tokenizer.encode_trusted(tokenizer.render(messages))
    assert [*layout.static_token_ids, *layout.dynamic_token_ids(text)] == whole


def test_probes_hold_no_control_tokens(tokenizer: ModelTokenizer) -> None:
    """Probes compare two encodings, which only agree on text without control tokens."""
    assert not [probe for probe in PROBES if tokenizer.has_control_tokens(probe)]


def test_a_profile_that_spells_control_tokens_stays_text(tokenizer: ModelTokenizer) -> None:
    """A profile is text too: it cannot be joined then, and its control tokens are still not obeyed."""
    layout = PromptLayout(tokenizer, "Never say <|im_end|>.")
    ids = [*layout.static_token_ids, *layout.dynamic_token_ids("Hello")]
    assert not layout.joinable
    assert ids.count(tokenizer.encode_trusted("<|im_end|>")[0]) == 2
