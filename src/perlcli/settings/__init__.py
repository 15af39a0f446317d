"""Everything a user can set: each option's name, type, default, limits and help, written once.

A stage's settings are a frozen dataclass of frozen groups (`settings.lora.lora_r`). In YAML, on the command line and
in the record the names are flat (`lora_r`), so each name is unique within a stage.
"""

from __future__ import annotations

from perlcli.settings.commands import (
    ALL_COMMANDS,
    COMMANDS,
    DATA_COMMANDS,
    RUNLESS_COMMANDS,
    DataCheck,
    DataConvert,
    DataShow,
    Doctor,
    Estimate,
    LengthSettings,
    Merge,
    OfData,
    Quickstart,
    Report,
    Runs,
    Serve,
    ServeSettings,
    Settings,
    Stage,
    command_of,
)
from perlcli.settings.comparing import CompareFull
from perlcli.settings.declaring import Option, dashed, flat, names, options
from perlcli.settings.defaults import GENERAL, LEARNING_RATES
from perlcli.settings.faults import check, limit_faults, misfit, place_fault
from perlcli.settings.precedence import build, layered, resolve
from perlcli.settings.running import LATEST, ONCE
from perlcli.settings.sampling import BASE, SFT
from perlcli.settings.stages import (
    ATTENTION,
    LORA,
    DataFormat,
    DataSettings,
    Dtype,
    Eval,
    LoraSettings,
    ModelSettings,
    Reward,
    Rl,
    Sft,
    TokenizerSettings,
    Training,
    Use,
)
