"""Checks on rows before they become tokens: duplicates, labels, prompts that are also trained on. Held-out rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import deepcopy

from perlcli.data.rows import Content, Data, DataReport, Message, Numbers, Preference, Row, Thumb, completions
from perlcli.errors import PerlError
from perlcli.text import counted, one_line

REPEATED = "repeating an earlier row"
TRAINED = "with a prompt that the model was trained on"
DIGEST_BYTES = 16
SHARE, FEWEST, MOST = 0.05, 32, 1000  # of the prompts: the share held out by default, and its limits
PERCENTILES = (50, 90, 99)
ADDED = ("margin", "template")  # what rows without them had no field for when the first records were written


class Digests:
    """Digests of rows with the rows' numbers: 24 bytes per row, as there can be many."""

    def __init__(self) -> None:
        self._digests, self._numbers = bytearray(), array("q")

    def add(self, digest: bytes, number: int) -> None:
        """Add the first `DIGEST_BYTES` bytes of a row's digest."""
        self._digests += digest[:DIGEST_BYTES]
        self._numbers.append(number)

    def __iter__(self) -> Iterator[bytes]:
        return unpacked(self._digests)

    def repeated(self) -> Numbers:
        """The numbers of the rows whose digest was already there when they were added, in the order of adding."""
        import numpy as np

        digests = np.frombuffer(bytes(self._digests), dtype=[("first", "u8"), ("second", "u8")])
        order = np.lexsort((digests["second"], digests["first"]))  # stable: among equal ones the earliest comes first
        again = order[1:][digests[order[1:]] == digests[order[:-1]]]
        return [self._numbers[place] for place in sorted(again.tolist())]

    def found_in(self, other: Iterable[bytes]) -> Numbers:
        """The numbers of the rows whose digest is among the others."""
        own = set(self)
        both = {digest for digest in other if digest in own}
        return [number for digest, number in zip(self, self._numbers, strict=True) if digest in both]

    def packed(self, numbers: Iterable[int], more: bytes) -> bytes:
        """The digests of the rows with these numbers, together with digests packed before: sorted, each once."""
        wanted = set(numbers)
        own = {digest for digest, number in zip(self, self._numbers, strict=True) if number in wanted}
        return b"".join(sorted(own.union(unpacked(more))))


def unpacked(content: bytes | bytearray) -> Iterator[bytes]:
    """The single digests in what `Digests.packed` returned."""
    return (bytes(content[place : place + DIGEST_BYTES]) for place in range(0, len(content), DIGEST_BYTES))


class Tally:
    """Collects what the report says about all rows together: fingerprint, duplicates and labels."""

    def __init__(self) -> None:
        self._fingerprint, self._digests, self._labels = hashlib.sha256(), Digests(), Counter[bool]()

    def add(self, number: int, row: Row) -> None:
        """Count a row."""
        content = encoded(row)
        self._fingerprint.update(content)
        self._digests.add(hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest(), number)
        if isinstance(row, Thumb):
            self._labels[row.label] += 1

    def put(self, report: DataReport) -> None:
        """Write the result into a report."""
        report.fingerprint = self._fingerprint.hexdigest()[:16]
        report.repeated = self._digests.repeated()
        report.labels = {"up": self._labels[True], "down": self._labels[False]} if self._labels else {}


def tally(data: Data) -> None:
    """Count all rows, and write the result into their report."""
    counts = Tally()
    for number, row in zip(data.numbers, data.rows, strict=True):
        counts.add(number, row)
    counts.put(data.report)


def drop_repeats(data: Data) -> None:
    """Keep only the first of rows that are exactly the same."""
    first: dict[bytes, int] = {}  # the place of the first row with this digest
    for place, row in enumerate(data.rows):
        if first.setdefault(hashlib.sha256(encoded(row)).digest(), place) != place:
            data.report.drop(REPEATED, data.numbers[place])
    restrict(data, list(first.values()))
    data.report.repeated = []


def restrict(data: Data, places: Sequence[int]) -> None:
    """Keep only the rows at these places, and report only on them."""
    data.rows = [data.rows[place] for place in places]
    data.numbers = [data.numbers[place] for place in places]
    remaining = set(data.numbers)
    data.report.kept, data.report.labels = len(data.rows), labels(data.rows)
    data.report.repeated = [number for number in data.report.repeated if number in remaining]
    data.report.overlap = [number for number in data.report.overlap if number in remaining]


def encoded(row: Row) -> bytes:
    """A row's kind and content as bytes, the same for equal rows."""
    values = {item.name: getattr(row, item.name) for item in dataclasses.fields(row)}
    fields = [value for name, value in values.items() if name not in ADDED or value not in (None, {})]
    return json.dumps([type(row).__name__, *fields], sort_keys=True, default=str).encode()


def labels(rows: Iterable[Row]) -> dict[str, int]:
    """The number of thumbs up and down; empty for rows of another kind."""
    thumbs = [row.label for row in rows if isinstance(row, Thumb)]
    return {"up": sum(thumbs), "down": len(thumbs) - sum(thumbs)} if thumbs else {}


def prompt_digest(row: Row) -> bytes:
    """A digest that is the same for rows with the same prompt, apart from white space. If a conversation has no
    separate prompt, the messages before its first answer count; of a text, all of it."""
    prompt: list[object] | str = _normalised(_prompt_of(row))
    if row.template:
        prompt = [prompt, json.dumps(row.template, sort_keys=True, default=str)]
    return hashlib.sha256(json.dumps(prompt).encode()).digest()


def _prompt_of(row: Row) -> Content | list[Content]:
    if row.prompt is not None:
        return row.prompt
    if isinstance(row, Preference):
        return [row.chosen, row.rejected]
    (messages,) = completions(row)  # of a demonstration, as the other kinds have a prompt
    if isinstance(messages, str):
        return messages
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[: max(first, 1)]


def _normalised(content: Content | list[Content] | Message) -> list[object] | str:
    if isinstance(content, str):
        return one_line(content)
    if isinstance(content, dict):
        more = {key: value for key, value in content.items() if key not in ("role", "content", "weight")}
        said = [content["role"], _normalised(content["content"] or "")]
        return [*said, json.dumps(more, sort_keys=True, default=str)] if more else said
    return [_normalised(part) for part in content]


def prompts(data: Data) -> Digests:
    """The digests of the rows' prompts."""
    digests = Digests()
    for number, row in zip(data.numbers, data.rows, strict=True):
        digests.add(prompt_digest(row), number)
    return digests


def overlap(train: Data, held_out: Data) -> Numbers:
    """The numbers of the held-out rows whose prompt is also a prompt of the training rows."""
    return prompts(held_out).found_in(prompts(train))


def drop_trained(data: Data, trained: Iterable[bytes]) -> None:
    """Leave out the rows whose prompt is among the packed digests. Raises PerlError if none is left."""
    digests, left = set(trained), []
    for place, (number, row) in enumerate(zip(data.numbers, data.rows, strict=True)):
        if prompt_digest(row)[:DIGEST_BYTES] in digests:
            data.report.drop(TRAINED, number)
        else:
            left.append(place)
    restrict(data, left)
    if not data.rows:
        hint = "evaluate on other data, or leave out --skip-trained"
        raise PerlError(f"--skip-trained leaves no row of {data.report.source}: the model was trained on all", hint)


def percentiles(lengths: Iterable[int]) -> dict[str, int]:
    """The 50th, 90th and 99th percentile of the lengths, and the longest; `lengths` may be a Counter."""
    ordered = sorted(Counter(lengths).elements())
    ranks = {f"p{part}": -(-len(ordered) * part // 100) for part in PERCENTILES}  # rounded up
    return {**{name: ordered[rank - 1] for name, rank in ranks.items()}, "max": ordered[-1]}


def hold_out(data: Data, fraction: float) -> tuple[Data, Data]:
    """The rows to train on, and about `fraction` of all rows to evaluate on. All rows of a prompt go to the same side,
    and so do all rows that one row of the source became, such as the steps of a dialog. The prompts with the lowest
    digests are held out until they make up the fraction, so the choice depends only on the prompts, not on their order
    or a seed. Raises PerlError if no row would be left to train on."""
    digests = _units(data)
    counts, wanted, taken = Counter(digests), fraction * len(digests), 0
    chosen: set[bytes] = set()
    for digest in sorted(counts):
        if chosen and taken + counts[digest] / 2 > wanted:  # include a prompt only if that comes nearer to the fraction
            break
        chosen.add(digest)
        taken += counts[digest]
    if len(chosen) == len(counts):
        raise PerlError(
            f"--eval-fraction {fraction:g} leaves no rows to train on: {data.report.source} has only "
            f"{counted(len(counts), 'distinct prompt')}, and rows with the same prompt stay together",
            "give held-out rows with --eval-data",
        )
    return _sides(data, digests, chosen, f"{fraction:g} held out by prompt")


def hold_out_some(data: Data) -> tuple[Data, Data] | None:
    """The same with the default share: `SHARE` of the prompts, at least `FEWEST` and at most `MOST`. None where that
    would be more than a third of the prompts or of the rows."""
    digests = _units(data)
    counts, taken = Counter(digests), 0
    wanted = min(MOST, max(FEWEST, round(SHARE * len(counts))))
    chosen: set[bytes] = set()
    for digest in sorted(counts):
        if len(chosen) < wanted and 3 * (taken + counts[digest]) <= len(digests):
            chosen.add(digest)
            taken += counts[digest]
    if len(chosen) < wanted or 3 * wanted > len(counts):
        return None
    return _sides(data, digests, chosen, "held out by prompt")


def _units(data: Data) -> list[bytes]:
    """For each row the lowest digest among the prompts that must stay together with its own."""
    leaders: dict[bytes, bytes] = {}
    firsts: dict[int, bytes] = {}  # of the rows of the source

    def leader(digest: bytes) -> bytes:
        while (above := leaders.setdefault(digest, digest)) != digest:
            leaders[digest] = leaders[above]
            digest = above
        return digest

    digests = [prompt_digest(row) for row in data.rows]
    for number, digest in zip(data.numbers, digests, strict=True):
        low, high = sorted((leader(firsts.setdefault(number, digest)), leader(digest)))
        leaders[high] = low
    return [leader(digest) for digest in digests]


def _sides(data: Data, digests: Sequence[bytes], chosen: Collection[bytes], words: str) -> tuple[Data, Data]:
    """The rows whose prompt is not among the chosen, and those whose prompt is."""
    held_out = _side(data, [place for place, digest in enumerate(digests) if digest in chosen])
    train = _side(data, [place for place, digest in enumerate(digests) if digest not in chosen])
    train.report.held_out = len(held_out.rows)
    held_out.report.source += f", {words}"
    held_out.report.read, held_out.report.extra, held_out.report.dropped = len(held_out.rows), 0, {}
    return train, held_out


def _side(data: Data, places: list[int]) -> Data:
    side = Data(data.rows, data.numbers, deepcopy(data.report))  # each side counts separately
    restrict(side, places)
    own = set(side.numbers)
    findings = {text: [number for number in numbers if number in own] for text, numbers in side.report.findings.items()}
    side.report.findings = {text: numbers for text, numbers in findings.items() if numbers}
    tally(side)
    return side
