"""Weight files: only safetensors are read, and a fingerprint identifies their content."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perlcli.errors import PerlError, line
from perlcli.text import shorten

if TYPE_CHECKING:  # torch takes seconds to import
    import torch

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
VALUE_HEAD = "value_head.safetensors"  # next to the adapter of a value model
PLACES = {"base_model_name_or_path", "revision"}  # in an adapter's config: where its base is, not what it does
INDEX, SHARD = "model.safetensors.index.json", re.compile(r"\w[\w.-]*\.safetensors")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
PICKLES = {"pytorch_model*.bin": "model*.safetensors", "adapter_model.bin": ADAPTER_WEIGHTS}  # and what we read instead
CONVERT = "if you trust it, load it with transformers or peft and save it with save_pretrained(NEW) as safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by their names in safetensors
LONGEST_HEADER = 100_000_000  # bytes: safetensors' own limit
PROBE = 256  # bytes that a fingerprint reads at each of three places of a tensor


def check(where: str, option: str = "--model") -> None:
    """Raises PerlError if the weights of a model or adapter are a pickle, which transformers and peft load if there is
    nothing else, or if an index of safetensors names one."""
    for pickle, safe in PICKLES.items():
        pickles = sorted(Path(where).glob(pickle))
        if pickles and not any(Path(where).glob(safe)):
            problem = f"the weights are a pickle, {pickles[0].name}, and loading a pickle can run any code"
            raise PerlError(f"{option} {where}: {problem}", CONVERT)
    index = file_of(where, INDEX)
    for name in _shards(index) if index is not None else []:
        if not SHARD.fullmatch(name):
            problem = f"{option} {where}: {INDEX} names {shorten(name)}, which is not a safetensors file"
            raise PerlError(problem, CONVERT)
        if Path(where).is_dir() and not (Path(where) / name).exists():
            raise PerlError(f"{option} {where}: {INDEX} names {name}, which is not there", "download the model again")


def _shards(index: Path) -> list[str]:
    try:
        return sorted(map(str, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PerlError(f"{index} can't be read: {line(error)}") from error


def file_of(place: str, name: str) -> Path | None:
    """A file in a folder, or in a Hub repository and downloaded if necessary; None if it is not available."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if Path(place).is_dir():
        return Path(place) / name if (Path(place) / name).exists() else None
    try:
        return Path(hf_hub_download(place, name))
    except (HFValidationError, HfHubHTTPError, OSError):
        return None


def names(where: str) -> dict[str, Path]:
    """The names of the tensors in the weights that are here, an adapter's or a base's, with the file of each; empty if
    none are. An adapter's are downloaded if necessary. Raises PerlError for damaged files."""
    adapter = file_of(where, ADAPTER_WEIGHTS)
    found: dict[str, Path] = {}
    for file in [adapter] if adapter is not None else _weight_files(where):
        found |= dict.fromkeys(_header(file), file)
    return found


def dtype(where: str) -> str | None:
    """The dtype that most bytes of a base's weights are stored in, as torch names it; None if the weights are not here
    (yet), or of another dtype than DTYPES. Raises PerlError for damaged files."""
    size: Counter[str] = Counter()
    for file in _weight_files(where):
        for name, entry in _header(file).items():
            try:
                size[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
            except (LookupError, TypeError) as error:
                raise PerlError(f"{file} is damaged: its header has no dtype or place for {name}") from error
    return DTYPES.get(size.most_common(1)[0][0]) if size else None


def _header(file: Path) -> dict[str, Any]:
    """What a weight file says of its tensors, by their names. Raises PerlError if it can't be read."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(min(int.from_bytes(opened.read(8), "little"), LONGEST_HEADER)))
        return {name: header[name] for name in header if name != "__metadata__"}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise PerlError(f"{file} can't be read: {line(error)}") from error


def tensor(where: str, name: str) -> torch.Tensor:
    """One tensor of these weights, in memory of its own: in a mapped file it may be unaligned, and CPU kernels then
    round differently. Raises PerlError if it can't be read."""
    from safetensors import SafetensorError, safe_open

    file = names(where)[name]
    try:
        with safe_open(str(file), framework="pt") as opened:
            value: torch.Tensor = opened.get_tensor(name).clone()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise PerlError(f"{file} can't be read: {line(error)}") from error
    return value


def copy_processor(base: str, folder: Path) -> None:
    """Copy what prepares a multimodal base's images and sound into the folder of a model made from it. Text needs none
    of it, and transformers can't write it without the libraries that it uses."""
    for name in PROCESSORS:
        file = file_of(base, name)
        if file is not None:
            shutil.copyfile(file, folder / name)


Stamp = tuple[Path, int, int, int]  # a file with its inode, size and time of last change


def fingerprint(where: str) -> str:
    """A digest of a base's weights, or of an adapter's weights and config, as stored on disk; empty if there are no
    safetensors files (yet: a Hub repository's arrive when it is loaded). Raises PerlError for damaged files.

    Reads each header and some bytes at the start, middle and end of every tensor: milliseconds for any size. Files are
    read once per process and again when they change.
    """
    files = _weight_files(where)
    if files and files[0].name == ADAPTER_WEIGHTS:
        files.append(files[0].with_name(ADAPTER_CONFIG))
    return _digest_of(tuple(map(_stamp, files))) if files else ""


def _stamp(file: Path) -> Stamp:
    if not file.exists():
        return file, 0, 0, 0  # a config that is missing: reading it raises the error
    stat = file.stat()
    return file, stat.st_ino, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=128)
def _digest_of(stamps: tuple[Stamp, ...]) -> str:
    digest = hashlib.sha256()
    for file, *_ in stamps:
        if file.name == ADAPTER_CONFIG:
            digest.update(_behaviour(file))
            continue
        try:
            for part in _probes(file):
                digest.update(part)
        except OSError as error:
            raise PerlError(f"{file} can't be read: {error.strerror}", "name the folder of a model") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise PerlError(f"{file} is damaged: its header can't be read") from error
    return digest.hexdigest()[:16]


def _probes(file: Path) -> Iterator[bytes]:
    """The header of a weight file and some bytes of each tensor; raises ValueError and the like if it is damaged."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, LONGEST_HEADER))
        yield header
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            for place in (begin, (begin + end) // 2, max(begin, end - PROBE)):
                opened.seek(8 + length + place)
                yield opened.read(max(0, min(PROBE, end - place)))


def _behaviour(config: Path) -> bytes:
    """What an adapter's config says about the adapter itself: the same weights with another alpha act differently."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        return json.dumps({name: values[name] for name in sorted(set(values) - PLACES)}).encode()
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise PerlError(f"{config} can't be read: {line(error)}") from error


def _weight_files(where: str) -> list[Path]:
    """A folder's weight files, or the cached ones of a Hub repository; an adapter's only if there is no base's."""
    if Path(where).is_dir():
        return sorted(Path(where).glob("model*.safetensors")) or sorted(Path(where).glob(ADAPTER_WEIGHTS))
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(where, INDEX)
    names = _shards(Path(index)) if isinstance(index, str) else ["model.safetensors"]
    for kind in (names, [ADAPTER_WEIGHTS]):
        cached = [try_to_load_from_cache(where, name) for name in kind]
        files = [Path(path) for path in cached if isinstance(path, str)]
        if files:
            return files
    return []
