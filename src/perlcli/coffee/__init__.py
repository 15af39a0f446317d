"""The embedded example: a barista turns a customer's sentence into one call. With data and a gold check.

Every kind of row, split and seed has its own random stream. An order always belongs to the same split, "train" or
"test" (`world.split_of`), and the base in `BASE` was pretrained only on orders of the train split.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perlcli.coffee.world import Order, call_of, draw_order, gold, mistake, remember, say

__all__ = ["BASE", "NAME", "SETTINGS", "demonstrations", "gold", "preferences", "prompts", "reward", "thumbs"]

BASE: Path = Path(__file__).parent / "base"
NAME = "coffee base (embedded)"
FLIPPED = 0.08
LIKED = 0.4

Row = dict[str, Any]

SMALL = {"lora_r": 8, "max_length": 128}
COSINE = {"set": ("lr_scheduler_type=cosine",)}
SAMPLING = {"temperature": 1.0, "max_completion_length": 40}
# The settings of each command on the embedded base and data.
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 60, "per_device_train_batch_size": 32, "learning_rate": 3e-3, **SMALL, **COSINE},
    "reward": {"max_steps": 120, "per_device_train_batch_size": 32, "learning_rate": 1e-3, **SMALL},
    "rl": {
        "max_steps": 80,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "beta": 0.02,
        "num_generations": 4,
        **SMALL,
        **SAMPLING,
        **COSINE,
    },
    "eval": {"max_samples": 400, "per_device_eval_batch_size": 100, "max_length": 128, **SAMPLING},
}


def demonstrations(split: str = "train", count: int = 2000, seed: int = 0) -> list[Row]:
    """Orders with the call written by a trainee barista who forgets details."""
    rows = []
    for rng, order, prompt in _orders("demonstrations", split, count, seed):
        completion = _message("assistant", call_of(remember(order, rng, _allowed(split))))
        rows.append({"prompt": prompt, "completion": completion, "order": call_of(order)})
    return rows


def preferences(split: str = "train", count: int = 4000, seed: int = 0) -> list[Row]:
    """Orders with the right call preferred to a wrong one; in train, 8 % of the labels are flipped."""
    rows = []
    for rng, order, prompt in _orders("preferences", split, count, seed):
        right = _message("assistant", call_of(order))
        wrong = _message("assistant", call_of(mistake(order, rng, _allowed(split))))
        if rng.random() < FLIPPED and split == "train":
            right, wrong = wrong, right
        rows.append({"prompt": prompt, "chosen": right, "rejected": wrong})
    return rows


def thumbs(split: str = "train", count: int = 4000, seed: int = 0) -> list[Row]:
    """Orders with one call each and whether it is right; about 40 % are."""
    rows = []
    for rng, order, prompt in _orders("thumbs", split, count, seed):
        right = rng.random() < LIKED
        answer = order if right else mistake(order, rng, _allowed(split))
        rows.append({"prompt": prompt, "completion": _message("assistant", call_of(answer)), "label": right})
    return rows


def prompts(split: str = "train", count: int = 2000, seed: int = 0) -> list[Row]:
    """Orders without an answer, each with the canonical call that `gold` compares a completion with."""
    orders = _orders("prompts", split, count, seed)
    return [{"prompt": prompt, "order": call_of(order)} for _, order, prompt in orders]


def reward(completions: list[Any], order: list[str], **columns: Any) -> list[float]:
    """The gold check as a reward function for TRL (`--reward perlcli.coffee:reward`): 1 for a right call, else 0."""
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [float(gold(text, wanted)) for text, wanted in zip(texts, order, strict=True)]


def _orders(kind: str, split: str, count: int, seed: int) -> Iterator[tuple[random.Random, Order, list[Row]]]:
    """Yields the random stream of this kind of row, an order, and a prompt that asks for it."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    rng = random.Random(f"coffee {kind} {split} {seed}")
    for _ in range(count):
        order = draw_order(rng, split)
        yield rng, order, _message("user", say(order, rng))


def _allowed(split: str) -> str | None:
    """The split that errors must stay in: in train, no answer may spell an order that is evaluated later."""
    return "train" if split == "train" else None


def _message(role: str, content: str) -> list[Row]:
    return [{"role": role, "content": content}]
