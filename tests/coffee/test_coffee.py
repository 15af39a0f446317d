"""The coffee world: reproducible rows, a strict split, a strict gold check, and a base that loads."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli import coffee
from perlcli.coffee import world
from perlcli.coffee.documents import documents

KINDS = (coffee.demonstrations, coffee.preferences, coffee.thumbs, coffee.prompts)
ORDER = "add_order_item(latte, size=large, milk=oat, shots=double)"


def fingerprint() -> str:
    rows = [kind(split, 50, 3) for kind in KINDS for split in ("train", "test")]
    return hashlib.sha256(json.dumps([rows, list(documents(50, 3))]).encode()).hexdigest()


def answers(row: dict[str, Any]) -> list[str]:
    """Every call that a row holds."""
    said = [row[key][0]["content"] for key in ("completion", "chosen", "rejected") if key in row]
    return said + ([row["order"]] if "order" in row else [])


def side(call: str) -> str:
    order = world.parse(call)
    assert order is not None
    return world.split_of(order)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_seed_split_and_nothing_else(kind: Callable[..., list[dict[str, Any]]]) -> None:
    assert kind("train", 20, 1) == kind("train", 20, 1)
    assert kind("train", 20, 1) == kind("train", 40, 1)[:20]
    assert kind("train", 20, 1) != kind("train", 20, 2)
    assert kind("train", 20, 1) != kind("test", 20, 1)
    assert [row["prompt"] for row in kind("train", 20, 1)] != [row["prompt"] for row in kind("train", 20, 2)]
    with pytest.raises(ValueError, match="'eval'"):
        kind("eval")


def test_rows_are_the_same_in_every_process_and_version() -> None:
    script = "import test_coffee; print(test_coffee.fingerprint())"
    path = os.pathsep.join([str(Path(coffee.__file__).parents[2]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == fingerprint()


def test_import_needs_only_the_standard_library() -> None:
    script = "import sys, perlcli.coffee; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    path = str(Path(coffee.__file__).parents[2])
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_train_rows_hold_no_order_that_is_judged(kind: Callable[..., list[dict[str, Any]]]) -> None:
    assert {side(call) for row in kind("train", 1000) for call in answers(row)} == {"train"}


def test_test_rows_ask_only_for_orders_that_were_never_trained() -> None:
    assert {side(row["order"]) for row in coffee.prompts("test", 500)} == {"test"}
    assert {side(row["order"]) for row in coffee.demonstrations("test", 500)} == {"test"}
    assert {side(row["chosen"][0]["content"]) for row in coffee.preferences("test", 500)} == {"test"}
    assert {side(row["completion"][0]["content"]) for row in coffee.thumbs("test", 500) if row["label"]} == {"test"}


def test_documents_hold_no_order_that_is_judged() -> None:
    calls = [text for document in documents(5000, 0) for _, text in document if text.startswith("add_order_item")]
    assert len(calls) > 500
    assert {side(call) for call in calls} == {"train"}


def test_a_fifth_of_all_orders_is_judged() -> None:
    rng = random.Random("split")
    orders = []
    for _ in range(4000):
        slots = rng.sample(list(world.SLOTS), 3)
        details = {slot: rng.choice(list(world.SLOTS[slot])) for slot in slots}
        orders.append(world.order_of(rng.choice(world.DRINKS), details))
    assert 0.17 < sum(world.split_of(order) == "test" for order in orders) / 4000 < 0.23


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (ORDER, True),
        (f"  {ORDER}\n", True),
        ("add_order_item(latte, shots=double, milk=oat, size=large)", True),
        ("add_order_item(latte, size=large, milk=oat)", False),
        ("add_order_item(latte, size=large, milk=oat, shots=double, whip=no)", False),
        ("add_order_item(latte, size=small, milk=oat, shots=double)", False),
        ("add_order_item(mocha, size=large, milk=oat, shots=double)", False),
        ("add_order_item(latte, size=large, size=large, milk=oat, shots=double)", False),
        (f"{ORDER} thanks", False),
        (f"sure: {ORDER}", False),
        (f"{ORDER}{ORDER}", False),
        (f"{ORDER}\n{ORDER}", False),
        (f"{ORDER}<end>", False),
        (ORDER[:-1], False),
        (ORDER.upper(), False),
        ("latte: size large, milk oat, shots double", False),
        ("add_order_item()", False),
        ("", False),
    ],
)
def test_gold(completion: str, right: bool) -> None:
    assert coffee.gold(completion, ORDER) is right


def test_gold_refuses_an_order_that_is_none() -> None:
    with pytest.raises(ValueError, match="not an order"):
        coffee.gold(ORDER, "a latte")


def test_calls_parse_back_to_their_order() -> None:
    rng = random.Random("round trip")
    for _ in range(2000):
        order = world.draw_order(rng, rng.choice(("train", "test")))
        assert world.parse(world.call_of(order)) == order
        assert world.parse(world.call_of(world.slip(order, rng))) is not None
        assert world.mistake(order, rng) != order


def test_every_detail_is_said() -> None:
    rng = random.Random("said")
    for _ in range(1000):
        order = world.draw_order(rng, "train")
        sentence = world.say(order, rng)
        assert order.drink in sentence
        for slot, value in order.details:
            early, late = world.SLOTS[slot][value]
            assert any(words in sentence for words in early + late)


def test_no_phrase_means_two_things() -> None:
    said = [words for values in world.SLOTS.values() for early, late in values.values() for words in early + late]
    assert len(said) == len(set(said))


def test_the_trainee_is_right_in_46_percent() -> None:
    rows = coffee.demonstrations("train", 4000)
    right = sum(coffee.gold(row["completion"][0]["content"], row["order"]) for row in rows)
    assert 0.43 < right / len(rows) < 0.49


def test_eight_percent_of_the_training_labels_are_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = coffee.preferences("train", 4000), coffee.preferences("test", 1000)
    monkeypatch.setattr(coffee, "FLIPPED", 0.0)
    flipped = [row for row, right in zip(train, coffee.preferences("train", 4000), strict=True) if row != right]
    assert 0.06 < len(flipped) / 4000 < 0.10
    assert test == coffee.preferences("test", 1000)


def test_thumbs_up_are_a_minority() -> None:
    rows = coffee.thumbs("train", 4000)
    assert 0.37 < sum(row["label"] for row in rows) / len(rows) < 0.43


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(coffee.BASE)


def test_the_base_is_small_and_loads(tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    assert sum(path.stat().st_size for path in coffee.BASE.rglob("*")) < 4_000_000
    model = AutoModelForCausalLM.from_pretrained(coffee.BASE)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() < 1_000_000
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token_id is None
    assert model.config.bos_token_id is None
    for settings in (model.config, model.generation_config):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id


def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer: Any) -> None:
    for row in coffee.demonstrations("test", 200):
        messages = row["prompt"] + row["completion"]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole[len(prompt) :]) == row["completion"][0]["content"] + "<end>"


def test_the_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    row = coffee.demonstrations("test", 1)[0]
    rendered = tokenizer.apply_chat_template(
        row["prompt"] + row["completion"], return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, kept in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(marked) == row["completion"][0]["content"] + "<end>"


def test_no_call_is_longer_than_a_dozen_tokens(tokenizer: Any) -> None:
    lengths = [len(tokenizer.encode(row["order"], add_special_tokens=False)) for row in coffee.prompts("test", 200)]
    assert max(lengths) <= 12
