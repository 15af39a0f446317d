"""Thumbs up and down in their spellings: numbers, words, emoji, and what --label-map and --label-threshold say."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from perlcli.data.fields import BadField, is_missing, number_of
from perlcli.errors import PerlError
from perlcli.settings import DataSettings
from perlcli.text import shorten

UP = "up|thumbs up|good|yes|true|chosen|accepted|preferred|positive|like|liked|correct|right|desirable|helpful|👍|1"
DOWN = (
    "down|thumbs down|bad|no|false|rejected|dispreferred|negative|dislike|disliked|incorrect|wrong|undesirable|"
    "unhelpful|👎|0|-1"
)
WORDS = {**dict.fromkeys(UP.split("|"), True), **dict.fromkeys(DOWN.split("|"), False)}
MEANINGS = {"1": True, "0": False, "none": None}  # what --label-map can say of a label
SKIN_TONES = dict.fromkeys([0xFE0F, *range(0x1F3FB, 0x1F400)])  # modifiers of emoji
PLAIN = DataSettings()
SHOWN = 8  # values that are not understood


class Labels:
    """Reads the labels of one source. Raises PerlError for a --label-map that can't be read."""

    def __init__(self, options: DataSettings = PLAIN) -> None:
        self._map, self._threshold = label_map(options.label_map), options.label_threshold
        self._numbers: set[float] = set()  # 0 or -1, which can't both be a thumbs down
        self._strange: dict[str, None] = {}

    @property
    def threshold(self) -> float | None:
        """The number from which on a label is a thumbs up."""
        return self._threshold

    def knows(self, value: object) -> bool:
        """Whether a value is a thumb: by --label-map, --label-threshold or its spelling."""
        word = spelled(value)
        is_rated = self._threshold is not None and number_of(value) is not None
        return word in self._map or is_rated or word in WORDS

    def read(self, value: object, name: str) -> bool | None:
        """Thumbs up or down; None if there is no label. Raises BadField for any other value: the column may be on a
        scale on which 1 is bad."""
        if is_missing(value):
            return None
        word, number = spelled(value), number_of(value)
        if word in self._map:
            return self._map[word]
        if self._threshold is not None and number is not None:
            return number >= self._threshold
        label = WORDS.get(word)
        if label is None:
            self._strange.setdefault(shorten(value, 30))
            raise BadField(f"{name} must be 0, 1, true or false, not {shorten(value)}")
        if number in (0, -1):
            self._numbers.add(number)
            if len(self._numbers) > 1:
                raise BadField(f"{name} has both 0 and -1, of which only one can be a thumbs down")
        return label

    @property
    def hint(self) -> str:
        """What to type if labels were not understood; empty if all were."""
        if len(self._numbers) > 1:
            return "say what each label means with --label-map 1=1,0=none,-1=0 (none leaves the row out)"
        if not self._strange:
            return ""
        found = list(self._strange)[:SHOWN]
        numbers = [number_of(value.strip("'")) for value in found]
        if None not in numbers:
            best = max(number for number in numbers if number is not None)
            limit = "4" if 4 <= best <= 5 else f"{best:g}"
            ways = f"{limit} and above a thumbs up, what is below a thumbs down"
            return f"on a scale, --label-threshold {limit} makes {ways}"
        mean = "means" if len(found) == 1 else "mean"
        way = f"--label-map {_to_fill_in(found)}, where N is 1 (up), 0 (down) or none"
        return f"say what {', '.join(found)} {mean} with {way}"


def _to_fill_in(found: list[str]) -> str:
    """A --label-map of the labels that it can hold. Which of them are good is not guessed."""
    words = [label.strip("'") for label in found if "," not in label and "\\" not in label and "…" not in label]
    return shlex.quote(",".join(f"{word}=N" for word in words) or "LABEL=N")


def spelled(value: object) -> str:
    """A label as a word to look up: without case, skin tones and underscores; a number without `.0`; empty for what is
    neither text nor a number."""
    number = number_of(value)
    if number is not None:
        return f"{number:.17g}"
    if not isinstance(value, str | bool):
        return ""
    word = str(value).translate(SKIN_TONES).strip().lower()
    return " ".join(word.replace("_", " ").replace("-", " ").split())


def label_map(given: str | None) -> Mapping[str, bool | None]:
    """What `--label-map` says: `up=1,down=0,unsure=none`. Raises PerlError if it can't be read."""
    found: dict[str, bool | None] = {}
    for item in (given or "").split(",") if given is not None else ():
        label, _, meaning = item.rpartition("=")
        if not label.strip() or meaning.strip() not in MEANINGS:
            problem = f"--label-map must be LABEL=1, LABEL=0 or LABEL=none, comma-separated, not {shorten(given)}"
            raise PerlError(problem, "such as --label-map up=1,down=0")
        found[spelled(label.strip())] = MEANINGS[meaning.strip()]
    return found
