"""What a user can set: each option's name, type, default and help, written once.

A stage's settings are a frozen dataclass of frozen groups (`settings.lora.lora_r`). Outside, in YAML, on the command
line and in the record, the names are flat (`lora_r`), so each is unique within a stage.
"""

from __future__ import annotations

from perlcli.settings.commands import (
    ALL_COMMANDS,
    COMMANDS,
    DATA_COMMANDS,
    RUNLESS_COMMANDS,
    CompareFull,
    DataCheck,
    DataConvert,
    DataShow,
    Doctor,
    Estimate,
    Eval,
    Merge,
    OfData,
    Quickstart,
    Report,
    Reward,
    Rl,
    Runs,
    Sft,
    Stage,
    Training,
    command_of,  # fmt: skip
)
from perlcli.settings.conflicts import check
from perlcli.settings.declaring import Option, dashed, names, options
from perlcli.settings.groups import (
    ATTENTION,
    BASE,
    LATEST,
    LORA,
    ONCE,
    SFT,
    Algorithm,
    DataSettings,
    Dtype,
    LengthSettings,
    LoraSettings,
    ModelSettings,
    Use,  # fmt: skip
)
from perlcli.settings.resolving import GENERAL, LEARNING_RATES, RL_ACCUMULATION, build, flat, misfit, resolve

__all__ = [
    "ALL_COMMANDS",
    "ATTENTION",
    "BASE",
    "COMMANDS",
    "DATA_COMMANDS",
    "GENERAL",
    "LATEST",
    "LEARNING_RATES",
    "LORA",
    "ONCE",
    "RL_ACCUMULATION",
    "RUNLESS_COMMANDS",
    "SFT",
    "Algorithm",
    "CompareFull",
    "DataCheck",
    "DataConvert",
    "DataSettings",
    "DataShow",
    "Doctor",
    "Dtype",
    "Estimate",
    "Eval",
    "LengthSettings",
    "LoraSettings",
    "Merge",
    "ModelSettings",
    "OfData",
    "Option",
    "Quickstart",
    "Report",
    "Reward",
    "Rl",
    "Runs",
    "Sft",
    "Stage",
    "Training",
    "Use",
    "build",
    "check",
    "command_of",
    "dashed",
    "flat",
    "misfit",
    "names",
    "options",
    "resolve",
]  # fmt: skip
