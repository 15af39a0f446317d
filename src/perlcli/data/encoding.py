"""From text to token ids: many texts at once, each only once, and with the place of each token in its text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from perlcli.data.cache import TokenCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
PARALLEL = "TOKENIZERS_PARALLELISM"
FORESEEN = 1_000_000  # ids that are kept in memory, at about 36 bytes each


class Encoder:
    """Encodes texts: plain text as the tokenizer does, but with one BOS and no EOS, and rendered chats as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.cache: TokenCache | None = None
        self._texts: dict[str, Ids] = {}
        self._chats: dict[str, Ids] = {}
        self._places: dict[str, list[int]] = {}
        probe, bare = self._encode("a", special=True), self._encode("a", special=False)
        self._has_bos = probe[:1] == [tokenizer.bos_token_id] != bare[:1]
        self._has_eos = len(probe) > 1 and probe[-1] == tokenizer.eos_token_id != bare[-1]

    def text(self, text: str | Ids) -> Ids:
        """The ids of a plain text, with the tokenizer's BOS once, and without an EOS that the text doesn't have."""
        if not isinstance(text, str):
            return list(text)
        known = self._texts.get(text)
        return self._plain(text) if known is None else list(known)

    def _plain(self, text: str) -> Ids:
        ids = self._encode(text, special=self._takes_special(text))
        return ids[:-1] if self._has_eos and self._takes_special(text) else ids

    def _takes_special(self, text: str) -> bool:
        return not (self._has_bos and text.startswith(str(self.tokenizer.bos_token)))

    def chat(self, rendered: str | Ids) -> Ids:
        """The ids of a rendered chat, or of any text as it is."""
        if not isinstance(rendered, str):
            return list(rendered)
        known = self._chats.get(rendered)
        return self._encode(rendered, special=False) if known is None else list(known)

    def places(self, rendered: str | Ids) -> list[int]:
        """Where each token of a rendered chat starts in its text."""
        if not isinstance(rendered, str):
            return list(range(len(rendered)))
        known = self._places.get(rendered)
        if known is not None:
            return known
        if self.tokenizer.is_fast:
            encoded: Any = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
            return [start for start, _ in encoded["offset_mapping"]]
        ids = self.chat(rendered)
        return [len(str(self.tokenizer.decode(ids[:count]))) for count in range(len(ids))]

    def _encode(self, text: str, *, special: bool) -> Ids:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def foresee(self, texts: list[str], *, special: bool, with_places: bool = False) -> None:
        """Encode texts at once: plain ones with the tokenizer's special tokens, or rendered chats. Those beyond
        `FORESEEN` ids are forgotten, the oldest first."""
        known = self._texts if special else self._chats
        if special:
            texts = [text for text in texts if self._takes_special(text)]
        new = [text for text in texts if text not in known or (with_places and text not in self._places)]
        if new:

            def encode() -> list[Ids]:
                with _on_all_cores():
                    given: Any = {"add_special_tokens": special, "return_offsets_mapping": with_places}
                    encoded = self.tokenizer(new, **given)
                ids = [list(row) for row in encoded["input_ids"]]
                return ids + [[start for start, _ in row] for row in encoded["offset_mapping"]] if with_places else ids

            kind = "text" if special else "chat with places" if with_places else "chat"
            lists = self.cache.ids(new, kind, encode, 1 + with_places) if self.cache else encode()
            ids = [row[:-1] for row in lists] if special and self._has_eos else lists[: len(new)]
            known |= zip(new, ids, strict=True)
            self._places |= zip(new, lists[len(new) :], strict=False)
        self._forget_oldest(known, set(texts))

    def _forget_oldest(self, known: dict[str, Ids], kept: set[str]) -> None:
        total = sum(map(len, known.values()))
        for text in list(known):  # the oldest first, but none of these
            if total <= FORESEEN or text in kept:
                break
            total -= len(known.pop(text))
            self._places.pop(text, None)

    def forget(self) -> None:
        """Free what `foresee` encoded."""
        for known in (self._texts, self._chats, self._places):
            known.clear()


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Let the tokenizer use threads; elsewhere they are off, as it warns about them whenever a process forks."""
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[PARALLEL] = before or "false"
