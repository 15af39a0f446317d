"""Files of weights: safetensors alone, and by what mark their content is known."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from perlcli.errors import PerlError, line
from perlcli.text import shorten

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLACES = {"base_model_name_or_path", "revision"}  # in an adapter's config: where its base lies, not what it does
INDEX, SHARD = "model.safetensors.index.json", re.compile(r"\w[\w.-]*\.safetensors")
PICKLES = {"pytorch_model*.bin": "model*.safetensors", "adapter_model.bin": ADAPTER_WEIGHTS}  # and what we read instead
CONVERT = "if you trust it, load it by transformers or peft and save_pretrained(NEW): that writes safetensors"
LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
PROBE = 256  # bytes that a fingerprint reads at each place of a tensor


def check(where: str, option: str = "--model") -> None:
    """Raise PerlError where weights are not safetensors: transformers and peft would take a pickle where there is
    nothing else, and where an index of safetensors names one."""
    place = Path(where)
    for pickle, safe in PICKLES.items():
        found = sorted(place.glob(pickle)) if place.is_dir() and not any(place.glob(safe)) else []
        if found:
            problem = f"{option} {where}: its weights are a pickle, {found[0].name}, and loading one can run any code"
            raise PerlError(problem, CONVERT)
    index = place / INDEX if place.is_dir() else of_hub(where, INDEX)
    for name in _shards(index) if index is not None and index.exists() else ():
        if not SHARD.fullmatch(name):
            raise PerlError(
                f"{option} {where}: {INDEX} names {shorten(name)}, which is no file of safetensors", CONVERT
            )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(map(str, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PerlError(f"{index} can't be read: {line(error)}") from error


def of_hub(name: str, file: str) -> Path | None:
    """A file of a hub repository; None where it can't be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file))
    except (HFValidationError, HfHubHTTPError, OSError):
        return None


def fingerprint(where: str) -> str:
    """A digest of a model's weights, or of an adapter's with its config, as stored, whatever precision they load in.

    Reads each safetensors header (names, types, shapes) and some bytes at the start, middle and end of every tensor, so
    that it takes milliseconds for any size. Empty where the files aren't safetensors. Raises PerlError where damaged.
    """
    digest = hashlib.sha256()
    files = _weight_files(where)
    for file in files:
        try:
            _digest(file, digest)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise PerlError(f"{file} is damaged: its header can't be read") from error
    if files and files[0].name == ADAPTER_WEIGHTS:
        digest.update(_behaviour(files[0].with_name(ADAPTER_CONFIG)))
    return digest.hexdigest()[:16] if files else ""


def _digest(file: Path, digest: Any) -> None:
    """Add what a file of weights holds to a digest. Raises ValueError and the like for one that isn't safetensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, LONGEST_HEADER))
        digest.update(header)
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            for place in (begin, (begin + end) // 2, max(begin, end - PROBE)):
                opened.seek(8 + length + place)
                digest.update(opened.read(max(0, min(PROBE, end - place))))


def _behaviour(config: Path) -> bytes:
    """What an adapter's config says of the adapter itself: the same weights under another alpha are another adapter."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return json.dumps({name: values[name] for name in sorted(set(values) - PLACES)}).encode()
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise PerlError(f"{config} can't be read: {line(error)}") from error


def _weight_files(where: str) -> list[Path]:
    if Path(where).is_dir():
        return sorted(Path(where).glob("model*.safetensors")) or sorted(Path(where).glob(ADAPTER_WEIGHTS))
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(where, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if isinstance(index, str):
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    for kind in (names, [ADAPTER_WEIGHTS]):
        cached = [try_to_load_from_cache(where, name) for name in kind]
        if found := [Path(path) for path in cached if isinstance(path, str)]:
            return found
    return []
