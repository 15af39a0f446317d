"""The embedded example: a barista turns a customer's sentence into one call. With data and a gold check.

Every kind of row, split and seed has its own random stream. An order always belongs to the same split, "train" or
"test" (`world.split_of`), and the base in `BASE` was pretrained only on orders of the train split.
"""

import random
from pathlib import Path
from typing import Any

from perlcli.coffee.presets import SETTINGS
from perlcli.coffee.world import call_of, chance, draw_order, gold, mistake, remember, say

__all__ = ["BASE", "NAME", "SETTINGS", "demonstrations", "gold", "preferences", "prompts", "reward", "thumbs"]

BASE: Path = Path(__file__).parent / "base"
NAME = "coffee base (embedded)"
FLIPPED = 0.08
LIKED = 0.4

Row = dict[str, Any]


def demonstrations(split: str = "train", count: int = 2000, seed: int = 0) -> list[Row]:
    """Orders with the call written by a trainee barista who forgets details."""
    rng = _stream("demonstrations", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        prompt = _message("user", say(order, rng))
        completion = _message("assistant", call_of(remember(order, rng, _allowed(split))))
        rows.append({"prompt": prompt, "completion": completion, "order": call_of(order)})
    return rows


def preferences(split: str = "train", count: int = 4000, seed: int = 0) -> list[Row]:
    """Orders with the right call preferred to a wrong one; in train, 8 % of the labels are flipped."""
    rng = _stream("preferences", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        prompt = _message("user", say(order, rng))
        right = _message("assistant", call_of(order))
        wrong = _message("assistant", call_of(mistake(order, rng, _allowed(split))))
        if chance(rng, FLIPPED) and split == "train":
            right, wrong = wrong, right
        rows.append({"prompt": prompt, "chosen": right, "rejected": wrong})
    return rows


def thumbs(split: str = "train", count: int = 4000, seed: int = 0) -> list[Row]:
    """Orders with one call each and whether it is right; about 40 % are."""
    rng = _stream("thumbs", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        prompt = _message("user", say(order, rng))
        right = chance(rng, LIKED)
        answer = order if right else mistake(order, rng, _allowed(split))
        rows.append({"prompt": prompt, "completion": _message("assistant", call_of(answer)), "label": right})
    return rows


def prompts(split: str = "train", count: int = 2000, seed: int = 0) -> list[Row]:
    """Orders without an answer, each with the canonical call that `gold` compares a completion with."""
    rng = _stream("prompts", split, seed)
    rows = []
    for _ in range(count):
        order = draw_order(rng, split)
        rows.append({"prompt": _message("user", say(order, rng)), "order": call_of(order)})
    return rows


def reward(completions: list[Any], order: list[str], **columns: Any) -> list[float]:
    """The gold check as a reward function for TRL (`--reward perlcli.coffee:reward`): 1 for a right call, else 0."""
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    return [float(gold(text, wanted)) for text, wanted in zip(texts, order, strict=True)]


def _stream(kind: str, split: str, seed: int) -> random.Random:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    return random.Random(f"coffee {kind} {split} {seed}")


def _allowed(split: str) -> str | None:
    """The split that errors must stay in: in train, no answer may spell an order that is evaluated later."""
    return "train" if split == "train" else None


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
