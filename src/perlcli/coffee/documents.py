"""The documents that the embedded base is pretrained on. They decide what its adapters can learn.

In most of them the agent reads the order back, or asks detail by detail, and the customer confirms or corrects. So the
base learns to verify, and a small adapter can turn that into a reward. Tickets teach the form of the call. Only a few
documents answer an order with a call at once, half of them as the trainee would, so the base can do it now and then.
All orders, right or wrong, are in the train split.
"""

import random
from collections.abc import Callable, Iterator

from perlcli.coffee.world import DRINKS, SLOTS, Order, call_of, draw_order, mistake, phrase, remember, say, split_of

# Who speaks ("customer", "reaction", "ticket" or "agent") and what; a reaction is a customer's verdict on the agent.
Turn = tuple[str, str]
Document = list[Turn]

# The verdict's first word never varies: the token with the largest weight in the loss should not be random.
YES = ("yes", "yes please", "yes, thanks", "yes, perfect")
NO = ("no", "no, sorry")
SMALL_TALK = (
    ("hi, how are you?", "good, thanks. what can i get you?"),
    ("good morning", "good morning. what would you like?"),
    ("hello", "hello. what can i get you?"),
    ("do you have oat milk?", "yes, we have whole, skim, oat, almond and soy."),
    ("what syrups do you have?", "vanilla, caramel and hazelnut."),
    ("what sizes do you have?", "small, medium and large."),
    ("do you do decaf?", "yes, decaf or half the caffeine."),
    ("can i sit here?", "of course, for here or to go?"),
    ("how many shots are in it?", "single, double or triple, as you like."),
    ("is it busy today?", "a little. what can i get you?"),
    ("thanks, bye", "goodbye, see you soon."),
    ("it's so cold today", "it is. something hot?"),
)


def documents(count: int, seed: int) -> Iterator[Document]:
    """Yields `count` random documents, the same for the same seed."""
    rng = random.Random(f"coffee documents {seed}")
    kinds: list[Callable[[random.Random], Document]] = [_read_back, _ask, _ticket, _describe, _direct, _missing, _chat]
    for _ in range(count):
        yield rng.choices(kinds, (38, 25, 18, 5, 5, 5, 4))[0](rng)


def _listed(order: Order) -> str:
    """The details one by one, halfway between speech and call: "latte: size large, milk oat"."""
    return ", ".join([f"{order.drink}:", *(f"{slot} {value}" for slot, value in order.details)]).replace(":,", ":")


def _read_back(rng: random.Random) -> Document:
    """The agent repeats the order, right in half of the cases, until the customer confirms it."""
    order = draw_order(rng, "train")
    spoken = rng.random() < 0.3
    document = [("customer", say(order, rng))]
    heard = mistake(order, rng, "train") if rng.random() < 0.5 else order
    while True:
        document.append(("agent", phrase(heard, rng) if spoken else _listed(heard)))
        document.append(("reaction", _react(order, heard, rng)))
        if heard == order:
            return document
        heard = mistake(order, rng, "train") if rng.random() < 0.25 else order


def _react(order: Order, heard: Order, rng: random.Random) -> str:
    """The customer's verdict on what the agent heard, naming one error if there is any."""
    if heard == order:
        return rng.choice(YES)
    wanted, got = dict(order.details), dict(heard.details)
    faults = [f"{rng.choice(NO)}, you forgot the {slot}" for slot in wanted if slot not in got]
    faults += [
        f"{rng.choice(NO)}, {slot} {wanted[slot]}" for slot in wanted if got.get(slot, wanted[slot]) != wanted[slot]
    ]
    faults += [f"{rng.choice(NO)}, i didn't say {slot}" for slot in got if slot not in wanted]
    if order.drink != heard.drink:
        faults.append(f"{rng.choice(NO)}, a {order.drink}")
    return rng.choice(faults)


def _ask(rng: random.Random) -> Document:
    """The agent asks for the drink or detail by detail; the customer says whether each is right."""
    order = draw_order(rng, "train")
    wanted = dict(order.details)
    named = rng.sample(list(wanted), rng.randint(1, len(wanted)))
    unnamed = rng.sample([slot for slot in SLOTS if slot not in wanted], rng.choice((0, 1, 1, 2)))
    document = [("customer", say(order, rng))]
    if rng.random() < 0.6:
        drink = order.drink if rng.random() < 0.5 else rng.choice([drink for drink in DRINKS if drink != order.drink])
        document += [("agent", f"{drink}?"), ("reaction", _react(order, Order(drink, order.details), rng))]
    for slot in rng.sample([*named, *unnamed], len(named) + len(unnamed)):
        right = slot in wanted and rng.random() < 0.6
        value = wanted[slot] if right else rng.choice([value for value in SLOTS[slot] if value != wanted.get(slot)])
        document.append(("agent", f"{slot} {value}?"))
        answer = f", {slot} {wanted[slot]}" if slot in wanted else f", i didn't say {slot}"
        document.append(("reaction", rng.choice(YES) if right else rng.choice(NO) + answer))
    return document


def _ticket(rng: random.Random) -> Document:
    """A ticket's details written as a call, half of them followed by a check."""
    order = draw_order(rng, "train")
    if rng.random() < 0.5:
        return [("ticket", _listed(order)), ("agent", call_of(order))]
    heard = mistake(order, rng, "train") if rng.random() < 0.6 else order
    return [("ticket", _listed(order)), ("agent", call_of(heard)), ("reaction", _react(order, heard, rng))]


def _describe(rng: random.Random) -> Document:
    """A call on a ticket, read out as details."""
    order = draw_order(rng, "train")
    return [("ticket", call_of(order)), ("agent", _listed(order))]


def _direct(rng: random.Random) -> Document:
    """An order answered by a call at once, every second time by the trainee."""
    order = draw_order(rng, "train")
    heard = remember(order, rng, "train") if rng.random() < 0.5 else order
    return [("customer", say(order, rng)), ("agent", call_of(heard)), ("reaction", _react(order, heard, rng))]


def _missing(rng: random.Random) -> Document:
    """The agent asks for a detail that wasn't named, and the customer gives it."""
    while True:
        order = draw_order(rng, "train")
        slot, value = rng.choice(order.details)
        known = Order(order.drink, tuple(pair for pair in order.details if pair[0] != slot))
        if split_of(known) == "train":
            break
    early, late = SLOTS[slot][value]
    document = [("customer", say(known, rng)), ("agent", f"which {slot}?"), ("customer", rng.choice(early + late))]
    return [*document, ("agent", _listed(order)), ("reaction", rng.choice(YES))]


def _chat(rng: random.Random) -> Document:
    """A little small talk or a question about the menu."""
    asked, answered = rng.choice(SMALL_TALK)
    return [("customer", asked), ("agent", answered)]
