"""The coffee world: orders, how customers say them, how a barista writes them down, and the gold check.

It needs only the standard library, and everything random comes from the caller's `random.Random`.
"""

import hashlib
import random
import re
from dataclasses import dataclass

DRINKS = ("latte", "cappuccino", "americano", "mocha", "macchiato", "espresso", "cortado", "chai", "matcha", "cocoa")

# Phrases said before the drink ("a big latte") and after it ("a latte in a big cup"), by slot and value.
Phrases = tuple[tuple[str, ...], tuple[str, ...]]
SLOTS: dict[str, dict[str, Phrases]] = {
    "quantity": {
        "two": (("two", "2", "a couple of", "a pair of"), ()),
        "three": (("three", "3"), ()),
        "four": (("four", "4"), ()),
    },
    "size": {
        "small": (("small", "little", "short"), ("in a small cup", "in the small size")),
        "medium": (("medium", "regular", "mid-size"), ("in a medium cup", "in the middle size")),
        "large": (("large", "big", "huge"), ("in a large cup", "in the biggest size")),
    },
    "temperature": {
        "hot": (("hot", "steaming", "extra hot"), ("nice and hot", "served hot")),
        "warm": (("warm", "lukewarm"), ("not too hot", "just warm")),
        "iced": (("iced", "cold", "chilled"), ("on ice", "over ice")),
    },
    "milk": {
        "whole": (("whole milk", "full fat"), ("with whole milk", "with full fat milk")),
        "skim": (("skinny", "skim", "nonfat"), ("with skim milk", "with nonfat milk")),
        "oat": (("oat", "oat milk"), ("with oat milk", "made with oat")),
        "almond": (("almond", "almond milk"), ("with almond milk", "made with almond")),
        "soy": (("soy", "soy milk"), ("with soy milk", "made with soy")),
    },
    "shots": {
        "single": (("single shot",), ("with one shot", "with a single shot", "just one shot")),
        "double": (("double", "double shot"), ("with two shots", "with a double shot")),
        "triple": (("triple", "triple shot"), ("with three shots", "with a triple shot")),
    },
    "caffeine": {
        "decaf": (("decaf", "decaffeinated"), ("without caffeine", "no caffeine")),
        "half": (("half caf", "half decaf"), ("with half the caffeine",)),
    },
    "syrup": {
        "vanilla": (("vanilla",), ("with vanilla", "with vanilla syrup", "with a pump of vanilla")),
        "caramel": (("caramel",), ("with caramel", "with caramel syrup", "with a pump of caramel")),
        "hazelnut": (("hazelnut",), ("with hazelnut", "with hazelnut syrup", "with a pump of hazelnut")),
    },
    "whip": {
        "yes": ((), ("with whip", "with whipped cream", "with cream on top")),
        "no": ((), ("no whip", "without whipped cream", "hold the cream")),
    },
    "place": {
        "here": ((), ("for here", "to stay", "to drink here")),
        "togo": ((), ("to go", "to take away", "to take with me")),
    },
}

OPENINGS = (
    "i'll have",
    "can i get",
    "can i have",
    "could i get",
    "i'd like",
    "i want",
    "give me",
    "let me get",
    "i'll take",
    "",
)
SMALL_TALK = (
    "hi,",
    "hello,",
    "hey there,",
    "good morning,",
    "it's so cold today.",
    "what a morning.",
    "busy today?",
    "it smells lovely in here.",
)
CLOSINGS = ("please", "thanks", "thank you", "if you can", "that's all", "for my friend")

# How often the trainee forgets a detail that the customer named.
FORGETS = {"quantity": 0.20, "size": 0.05, "temperature": 0.15, "milk": 0.15, "shots": 0.45}
FORGETS |= {"caffeine": 0.30, "syrup": 0.45, "whip": 0.55, "place": 0.55}

TESTED = 51 / 256  # of all orders

CALL = re.compile(r"add_order_item\(([a-z]+)((?:, [a-z]+=[a-z]+)*)\)")


@dataclass(frozen=True)
class Order:
    """One drink with the details that the customer named, in slot order."""

    drink: str
    details: tuple[tuple[str, str], ...] = ()


def order_of(drink: str, details: dict[str, str]) -> Order:
    """The order with its details in slot order."""
    return Order(drink, tuple((slot, details[slot]) for slot in SLOTS if slot in details))


def call_of(order: Order) -> str:
    """The canonical call, e.g. `add_order_item(latte, size=large, milk=oat)`."""
    return f"add_order_item({', '.join([order.drink, *(f'{slot}={value}' for slot, value in order.details)])})"


def parse(text: str) -> Order | None:
    """The order of a text that is exactly one well-formed call, else None. Surrounding whitespace is allowed."""
    match = CALL.fullmatch(text.strip())
    if match is None:
        return None
    pairs = [pair.split("=") for pair in match[2].split(", ")[1:]]
    details = dict(pairs)
    known = all(value in SLOTS.get(slot, {}) for slot, value in details.items())
    if match[1] not in DRINKS or not known or len(details) < len(pairs):
        return None
    return order_of(match[1], details)


def gold(completion: str, order: str) -> bool:
    """Whether the completion is exactly one call for the order, with its details in any sequence. Raises ValueError if
    `order` is not a call."""
    wanted = parse(order)
    if wanted is None:
        raise ValueError(f"not an order: {order!r}")
    return parse(completion) == wanted


def split_of(order: Order) -> str:
    """The split that an order always belongs to: "test" for about a fifth of all orders, else "train"."""
    digest = hashlib.sha256(call_of(order).encode()).digest()
    return "test" if digest[0] < 256 * TESTED else "train"


def draw_order(rng: random.Random, split: str) -> Order:
    """A random order with one to four details from a split."""
    while True:
        count = rng.choices((1, 2, 3, 4), (2, 3, 3, 2))[0]
        slots = rng.sample(list(SLOTS), count)
        order = order_of(rng.choice(DRINKS), {slot: rng.choice(list(SLOTS[slot])) for slot in slots})
        if split_of(order) == split:
            return order


def phrase(order: Order, rng: random.Random) -> str:
    """The order as a customer says it, without a greeting: "a big oat latte, with two shots"."""
    before: list[str] = []
    after: list[str] = []
    count = ""
    for slot, value in order.details:
        early, late = SLOTS[slot][value]
        words = rng.choice(early + late)
        if slot == "quantity":
            count = words
        else:
            (before if words in early else after).append(words)
    rng.shuffle(before)
    rng.shuffle(after)
    noun = " ".join([*before, order.drink])
    noun = f"{count} {noun}s" if count else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    for index, words in enumerate(after):
        noun += rng.choice((" and ", ", and ", ", ") if index else (" ", " ", ", ")) + words
    return noun


def say(order: Order, rng: random.Random) -> str:
    """A customer's sentence for an order, sometimes with small talk."""
    words = [rng.choice(SMALL_TALK)] if rng.random() < 0.25 else []
    words += [rng.choice(OPENINGS), phrase(order, rng)]
    sentence = " ".join(word for word in words if word)
    return f"{sentence}, {rng.choice(CLOSINGS)}" if rng.random() < 0.3 else sentence


def remember(order: Order, rng: random.Random, split: str | None = None) -> Order:
    """What the trainee barista remembers of an order; with a split, only orders of that split."""
    while True:
        heard = Order(order.drink, tuple(pair for pair in order.details if rng.random() >= FORGETS[pair[0]]))
        if split is None or split_of(heard) == split:
            return heard


def slip(order: Order, rng: random.Random) -> Order:
    """The order with one random error: a detail lost, changed or invented, or another drink."""
    details = dict(order.details)
    error = rng.choices(("lose", "change", "invent", "drink"), (3, 4, 2, 3))[0]
    if error == "drink":
        return order_of(rng.choice([drink for drink in DRINKS if drink != order.drink]), details)
    if error == "invent":
        slot = rng.choice([slot for slot in SLOTS if slot not in details])
        return order_of(order.drink, {**details, slot: rng.choice(list(SLOTS[slot]))})
    slot = rng.choice(list(details))
    value = details.pop(slot)
    if error == "change":
        details[slot] = rng.choice([other for other in SLOTS[slot] if other != value])
    return order_of(order.drink, details)


def mistake(order: Order, rng: random.Random, split: str | None = None) -> Order:
    """A wrong version of an order, with a trainee's or a random error; with a split, one of that split."""
    while True:
        wrong = remember(order, rng) if rng.random() < 0.4 else slip(order, rng)
        if wrong != order and split in (None, split_of(wrong)):
            return wrong
