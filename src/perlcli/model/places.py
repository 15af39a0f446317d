"""Where a model name leads, as far as file names and JSON say it: `sources` reads configs there. Loads no library but
the Hub's, so that a wrong name is refused at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perlcli import coffee
from perlcli.errors import PerlError, line
from perlcli.model import weights
from perlcli.model.weights import ADAPTER_CONFIG
from perlcli.settings import place_fault

CONFIG = "config.json"
FOLDER = "name the folder of a model, of an adapter or of a run"
NETWORK = "check the name and the network"


@dataclass(frozen=True)
class Place:
    """A folder or a Hub repository with a model or an adapter."""

    where: str  # a folder's absolute path, or a Hub id
    is_adapter: bool

    @property
    def base(self) -> str:
        """The base that is here, or that the adapter names; empty if its config can't be read here."""
        if not self.is_adapter:
            return self.where
        named = self._config().get("base_model_name_or_path")
        return here(named) if isinstance(named, str) and not place_fault(named) else ""

    @property
    def is_classifier(self) -> bool:
        """Whether a reward model is here, as far as its config can be read here."""
        config = self._config()
        if self.is_adapter:
            return config.get("task_type") == "SEQ_CLS"
        return "ForSequenceClassification" in str(config.get("architectures"))

    def _config(self) -> dict[str, Any]:
        """The config of the adapter or model; empty if it can't be read here."""
        try:
            text = (Path(self.where) / (ADAPTER_CONFIG if self.is_adapter else CONFIG)).read_text(encoding="utf-8")
            content = json.loads(text)
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


def find(name: str, option: str = "--model") -> Place:
    """Where a name leads. Raises PerlError, which blames `option`, if there is neither a model nor an adapter, or if
    its weights are a pickle."""
    path = Path(name).expanduser()
    if path.is_file():
        raise PerlError(f"{option} {name} is a file", "name the folder that contains it")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise PerlError(f"{option} {name} does not exist")
        return Place(name, _hub_has_adapter(name, option))
    where = str(path.resolve())  # absolute, so that adapters find their base from anywhere
    weights.check(where, option)
    is_adapter = (path / ADAPTER_CONFIG).exists()
    if not is_adapter and not (path / CONFIG).exists():
        raise PerlError(f"{option} {where} can't be read as a model: it has no {CONFIG}", inside(where) or FOLDER)
    return Place(where, is_adapter)


def inside(where: str) -> str:
    """A hint at the adapters in a folder's folders; empty if there are none."""
    adapters = sorted(str(path.parent) for path in Path(where).glob(f"*/{ADAPTER_CONFIG}"))
    return f"it contains adapters; name one: {', '.join(adapters)}" if adapters else ""


def here(base: str) -> str:
    """Where the base that an adapter names is: an embedded base of another environment is that of this one."""
    if base and not Path(base).exists() and Path(base).parts[-3:] == coffee.BASE.parts[-3:]:
        return str(coffee.BASE)
    return base


def is_embedded(base: str) -> bool:
    """Whether a base is the one that comes with perlcli, in this environment or another."""
    folder = Path(base)
    if not folder.is_dir() or folder.parts[-3:] != coffee.BASE.parts[-3:]:
        return False
    return folder.resolve() == coffee.BASE.resolve() or weights.fingerprint(base) == weights.fingerprint(
        str(coffee.BASE)
    )


def is_cached(name: str) -> bool:
    """Whether a Hub repository's config is in the local cache: then its name is right."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in (CONFIG, ADAPTER_CONFIG))
    except HFValidationError:
        return False


def _hub_has_adapter(name: str, option: str) -> bool:
    """Whether a Hub repository contains an adapter; raises PerlError if it doesn't exist or can't be reached."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return bool(hf_hub_download(name, ADAPTER_CONFIG))
    except LocalEntryNotFoundError as error:  # no network: a base may be in the cache all the same
        if isinstance(try_to_load_from_cache(name, CONFIG), str):
            return False
        raise PerlError(f"{option} {name} is not a local folder, and the Hub can't be reached", NETWORK) from error
    except EntryNotFoundError:
        return False
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise PerlError(f"{option} {name} is neither a local folder nor a model on the Hub: {line(error)}") from error
