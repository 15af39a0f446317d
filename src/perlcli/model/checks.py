"""What a base can't do, found before its weights load: from its config, and its modules without weights."""

from __future__ import annotations

from torch import nn
from transformers import __version__

from perlcli.errors import PerlError, line
from perlcli.model import context, quantised, sources
from perlcli.model.auto_classes import CLASSES, causal_class
from perlcli.model.sources import Source
from perlcli.settings import ModelSettings


def modules(
    source: Source, *, option: str = "--model", scored: bool = False, trust_remote_code: bool = False
) -> nn.Module | None:
    """The base's modules without weights; None for code of its own that needs weights to be built, and for what is to
    be `scored` and has only a sequence classifier, if any (`heads` decides). Raises PerlError if transformers has no
    class for it, or can't build it."""
    kind, config = causal_class(source.config), source.config
    own = getattr(config, "auto_map", None)
    if type(config) not in CLASSES[kind] and not own:
        if scored:
            return None
        problem = f"{option} {source.name} is {config.model_type}, for which transformers {__version__} has no class"
        raise PerlError(f"{problem} of causal language models", "name a causal language model")
    try:
        return sources.built(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library's, or of the model's own code
        if own:
            return None
        problem = f"{option} {source.name} can't be built as a causal language model: {line(error)}"
        raise PerlError(problem, "name another model") from error


def check(
    source: Source, given: ModelSettings, *, longest: int | None = None, full: bool = False, scored: bool = False
) -> list[str]:
    """What to note about a base before it loads; `scored` if it is, or becomes, a reward model. Raises
    PerlError if it can't be loaded as the settings ask for, or can't read rows of `longest` tokens."""
    trust = given.trust_remote_code
    _check_dropouts(source)
    notes = [quantised.check(source, given, full=full)]
    model = modules(source, scored=scored, trust_remote_code=trust)
    if longest is not None:
        notes.append(context.check(source, longest, model))
    return [note for note in notes if note is not None]


def _check_dropouts(source: Source) -> None:
    """Raises PerlError for a dropout in the config that is not a probability: training would stop at the first step."""
    for name, value in source.config.get_text_config().to_dict().items():
        is_dropout = any(name.endswith(end) for end in ("dropout", "pdrop", "dropout_prob"))
        if is_dropout and isinstance(value, int | float) and not 0 <= value < 1:
            problem = f"{source.base_name}: config.json has {name} {value:g}, which must be from 0 to below 1"
            raise PerlError(problem, "correct config.json, or download the model again")
