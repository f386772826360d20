"""The arithmetic of bench/engine.py, and that both sides are asked the same."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.enginelab.checkpoint import SHAPES, endless, shape_only
from bench.enginelab.prompts import Ask, Prompts
from bench.enginelab.rounds import Answered, Round, play
from gateway_app.assembly import assemble
from gateway_app.profiles import ActiveProfile
from tasks.job import Sampling, TaskRequest
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import read_profile
from tasks.prompts.tokenizer import ModelTokenizer
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that all tests here read."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def read(path: Path) -> dict[str, Any]:
    """Return what a file of a checkpoint says."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def test_round_is_counted_from_the_first_question_to_the_last_answer() -> None:
    """Two answers that overlap: 6 tokens in 4 seconds, first tokens after 1 and 2, and steps of 1 and half a second."""
    played = Round([Answered(10.0, 11.0, 13.0, 3), Answered(11.0, 13.0, 14.0, 3)])
    assert (played.tokens, played.tokens_per_s, played.first_token_s, played.step_s) == (6, 1.5, 1.5, 0.75)


def test_answers_of_one_token_have_no_step() -> None:
    """There is no time between two tokens where there is one."""
    assert Round([Answered(0.0, 1.0, 1.0, 1), Answered(0.0, 1.0, 5.0, 3)]).step_s == 2.0


def test_clients_ask_side_by_side_and_each_waits_for_its_answer() -> None:
    """Every client has one question on its way, until it has none left."""
    running: list[str] = []
    seen: list[list[str]] = []

    async def answer(ask: Ask) -> Answered:
        running.append(ask.text)
        await asyncio.sleep(0)
        seen.append(sorted(running))
        running.remove(ask.text)
        return Answered(0.0, 0.0, 1.0, 1)

    asks = {name: Ask("agent", name, []) for name in ("a1", "a2", "b1", "b2")}
    played = asyncio.run(play([[asks["a1"], asks["a2"]], [asks["b1"], asks["b2"]]], answer))
    assert played.tokens == 4
    assert seen[0] == ["a1", "b1"]
    assert not any({"a1", "a2"} <= {*together} or {"b1", "b2"} <= {*together} for together in seen)


def test_endless_checkpoint_differs_in_its_end_only(tiny: Path, tmp_path: Path) -> None:
    """It ends at a token that is neither the usual end nor a beginning."""
    made = endless(tiny, tmp_path / "made")
    assert {file.name for file in made.iterdir()} == {file.name for file in tiny.iterdir()}
    before, after = read(tiny / "tokenizer_config.json"), read(made / "tokenizer_config.json")
    assert after["eos_token"] not in (before["eos_token"], before["bos_token"], before["pad_token"])
    assert {**after, "eos_token": before["eos_token"]} == before
    token_id = ModelTokenizer(made).encode_trusted(after["eos_token"])
    assert [read(made / name)["eos_token_id"] for name in ("config.json", "generation_config.json")] == token_id * 2


def test_checkpoint_without_another_special_token_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Nothing could stand for the end."""
    poor = shutil.copytree(tiny, tmp_path / "poor")
    tokenizer = read(poor / "tokenizer.json")
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["content"] != "<|endoftext|>"]
    (poor / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(SystemExit, match="no special token"):
        endless(poor, tmp_path / "made")


def test_shape_has_no_weights_and_room_for_every_token(tiny: Path, tmp_path: Path) -> None:
    """The tokenizer is the model's, all else the shape's."""
    made = shape_only("llama-8b", tiny, tmp_path / "made")
    config = read(made / "config.json")
    assert not list(made.glob("*.safetensors"))
    assert SHAPES["llama-8b"].items() <= config.items()
    assert config["vocab_size"] % 128 == 0
    assert config["vocab_size"] >= read(tiny / "config.json")["vocab_size"]


def test_engine_alone_gets_the_ids_that_the_gateway_makes(tiny: Path, tmp_path: Path) -> None:
    """What the gateway assembles of a question's text is the prompt that goes with it; no two begin alike."""
    prompts = Prompts(tiny, tmp_path, seed=1)
    agent = prompts.agent("asked", 40)
    profile = read_profile(tmp_path / f"{agent}.yaml")
    layout = PromptLayout(ModelTokenizer(tiny), profile.text)
    active = ActiveProfile(profile, layout, "hash")
    asks = prompts.asks(agent, 5, 12)
    for ask in asks:
        task = TaskRequest(
            agent=agent,
            api="chat",
            messages=({"role": "user", "content": ask.text},),
            sampling=Sampling(max_tokens=4),
        )
        prompt, _ = assemble(task, active, lambda: active, 2048)
        assert [*layout.static_token_ids, *prompt.dynamic_token_ids] == ask.token_ids
    assert len({ask.text for ask in asks}) == len(asks)


def test_same_seed_asks_the_same(tiny: Path, tmp_path: Path) -> None:
    """A run can be repeated."""
    asks = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        prompts = Prompts(tiny, tmp_path / folder, seed=7)
        asks.append(prompts.asks(prompts.agent("asked", 30), 3, 8))
    assert asks[0] == asks[1]
