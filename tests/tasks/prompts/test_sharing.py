"""What two profiles are said to share is the same in both, token by token, for any profiles and several tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tasks.prompts.chain import hash_chain
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import ORDER, AnySegment, Example, FewShot, Profile, Segment
from tasks.prompts.sharing import MAX_ENDS, Said
from tasks.prompts.tokenizer import ModelTokenizer
from tests.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS, TEXT

#: As Llama 3 and Qwen cut text into words: line ends join what stands before them.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: What stands before the system message tells of all that follows it.
COUNTING = "<|im_start|>{{ messages | length }} messages\n<|im_end|>" + CHAT_TEMPLATE
HOUSE = "You work for the house, and answer in whole sentences.\n" * 6


def bpe(words: str | None = None) -> Tokenizer:
    """Return a byte-level BPE tokenizer: GPT-2's, or one that cuts text at `words`."""
    tokenizer = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, TEXT.replace(". ", ".\n\n"), "!\n\n?\n\n" * 20], trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """Return a tokenizer that finds the likeliest way to cut all of a text, without words, as SentencePiece does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *SPECIAL_TOKENS],
        unk_token="<unk>",  # noqa: S106  no password
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.replace(". ", ".\n\n"), *TEXT.splitlines(), "the\n\nthe a\n\na" * 9], trainer)
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "words of GPT-2": (bpe, CHAT_TEMPLATE),
    "words of Llama 3, trimming": (lambda: bpe(WORDS), TRIMMING),
    "no words": (unigram, CHAT_TEMPLATE),
    "counts messages": (bpe, COUNTING),
}


@pytest.fixture(scope="module")
def checkpoints(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelTokenizer]:
    """Return a tokenizer of each kind."""
    made = {}
    for name, (train, template) in KINDS.items():
        folder = tmp_path_factory.mktemp("checkpoint") / "model"
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        train().save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}), "utf-8")
        made[name] = ModelTokenizer(folder)
    return made


def said(profile: Profile) -> Said:
    """Return what a profile says, as layouts take it."""
    return profile.text or None, [(example.user, example.assistant) for example in profile.examples]


def shared(tokenizer: ModelTokenizer, profile: Profile) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return a profile's static ids, and how many of them each link inside it stands for."""
    layout = PromptLayout(tokenizer, *said(profile), [said(beginning) for beginning in profile.beginnings(MAX_ENDS)])
    links = hash_chain(b"salt", [(segment.kind, segment.content) for segment in profile.segments])[:-1]
    return layout.static_token_ids, {link.hash: end for link, end in zip(links, layout.ends, strict=False) if end}


def check(tokenizer: ModelTokenizer, one: Profile, other: Profile) -> set[str]:
    """Check that what both profiles have a link for is the same in both; return those links."""
    (ids, ends), (other_ids, other_ends) = shared(tokenizer, one), shared(tokenizer, other)
    for found, length in ((ends, len(ids)), (other_ends, len(other_ids))):
        assert sorted(set(found.values())) == list(found.values())
        assert all(0 < end < length for end in found.values())
    for link in ends.keys() & other_ends.keys():
        assert ends[link] == other_ends[link]
        assert ids[: ends[link]] == other_ids[: ends[link]]
    return ends.keys() & other_ends.keys()


#: Pieces whose tokens may reach over a border, and whatever else Hypothesis thinks of.
PIECES = ["the", " the", ".", "!", "\n", "\n\n", "  ", "\t", "\r\n", "```", "a", "\u0301", "é", "漢", "12", "qzx", "'s", "{{ x }}"]  # fmt: skip
pieces = st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
texts = st.lists(pieces, max_size=8).map("".join).filter(bool)
examples = st.builds(Example, user=texts, assistant=texts)
bases = st.builds(Segment, kind=st.just("agent_base_profile"), text=texts)
roles = st.builds(Segment, kind=st.sampled_from(ORDER[1:3]), text=texts)
few_shots = st.builds(FewShot, kind=st.just("few_shot"), examples=st.lists(examples, min_size=1, max_size=2))


def profile(parts: Sequence[AnySegment]) -> Profile:
    """Return a profile of these segments, in the order that profiles have."""
    ordered = sorted(parts, key=lambda part: ORDER.index(part.kind))
    return Profile(agent="a", version=1, segments=tuple(ordered))


@pytest.mark.parametrize("kind", KINDS)
@given(
    base=st.lists(bases | roles, min_size=1, max_size=3) | st.lists(bases | few_shots, min_size=1, max_size=3),
    one=st.lists(roles | few_shots, min_size=1, max_size=2),
    other=st.lists(roles | few_shots, min_size=1, max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_what_is_shared_is_the_same(
    checkpoints: dict[str, ModelTokenizer],
    kind: str,
    base: list[AnySegment],
    one: list[AnySegment],
    other: list[AnySegment],
) -> None:
    """Of any two profiles that begin alike: the same ends, and the same ids up to there."""
    check(checkpoints[kind], profile([*base, *one]), profile([*base, *other]))
    check(checkpoints[kind], profile(base), profile([*base, *other]))


def house(*more: str, text: str = HOUSE) -> Profile:
    """Return a profile of the house's base, and roles."""
    roles = [Segment(kind="role", text=each) for each in more]
    return profile([Segment(kind="agent_base_profile", text=text), *roles])


@pytest.mark.parametrize("kind", ["words of GPT-2", "words of Llama 3, trimming", "no words"])
def test_nearly_all_of_a_base_is_shared(checkpoints: dict[str, ModelTokenizer], kind: str) -> None:
    """All but the tokens at its end, which may be others in front of another text; a second role ends further on."""
    tokenizer = checkpoints[kind]
    base = [*tokenizer.encode_trusted("<|im_start|>system\n"), *tokenizer.encode_plain(HOUSE.strip())]
    ids, ends = shared(tokenizer, house("Poet.", "Answer in rhymes."))
    first, second = ends.values()
    assert len(base) - 1 <= first <= len(base)
    assert first + len(tokenizer.encode_plain("Poet.")) <= second < len(ids)
    assert len(check(tokenizer, house("Poet.", "x"), house("Poet.", "y"))) == 2
    assert len(check(tokenizer, house("Poet.", "x"), house("Painter.", "y"))) == 1
    assert not check(tokenizer, house("Poet.", "x"), house("Poet.", "x", text="Elsewhere. " + HOUSE))


def test_an_end_is_cut_back_where_tokens_reach_over_it(checkpoints: dict[str, ModelTokenizer]) -> None:
    """With Llama 3's words a full stop and the line ends after it may be one token, which not every profile has."""
    tokenizer = checkpoints["words of Llama 3, trimming"]
    text = "Answer in words!"
    alone, going_on = tokenizer.encode_plain(text), tokenizer.encode_plain(text + "\n\nPoet.")
    assert going_on[: len(alone)] != alone, "without cutting back, two profiles would be said to share what differs"
    (link,) = check(tokenizer, house("Poet.", text=text), house("Painter.", text=text))
    _, ends = shared(tokenizer, house("Poet.", text=text))
    before = tokenizer.encode_trusted("<|im_start|>system\n")
    assert ends[link] == len(before) + len(alone) - 1


def test_a_template_that_tells_of_the_rest_shares_little(checkpoints: dict[str, ModelTokenizer]) -> None:
    """Where what comes first depends on what comes later, profiles with other examples begin otherwise.

    Only the control token before that is the same.
    """
    tokenizer = checkpoints["counts messages"]
    plain = house("Poet.", "x")
    shots = FewShot(kind="few_shot", examples=(Example(user="x", assistant="y"),))
    assert check(tokenizer, plain, house("Poet.", "y"))
    check(tokenizer, plain, profile([*house("Poet.").segments, shots]))
    assert list(shared(tokenizer, plain)[1].values()) == [1]


def test_ends_are_bounded(checkpoints: dict[str, ModelTokenizer]) -> None:
    """However many segments a profile has: they travel with each message."""
    _, ends = shared(checkpoints["words of GPT-2"], house(*(f"Rule {number}." for number in range(100))))
    assert len(ends) == MAX_ENDS


def test_a_profile_that_is_not_joined_shares_nothing(checkpoints: dict[str, ModelTokenizer]) -> None:
    """It has no static part."""
    assert shared(checkpoints["words of GPT-2"], house("Never say <|im_end|>.")) == ((), {})
