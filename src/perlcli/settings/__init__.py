"""Everything a user can set: each option's name, type, default, limits and help, written once.

A stage's settings are a frozen dataclass of frozen groups (`settings.lora.lora_r`). In YAML, on the command line and
in the record the names are flat (`lora_r`), so each name is unique within a stage.
"""

from __future__ import annotations

from perlcli.settings.building import build, flat
from perlcli.settings.choices import ATTENTION, BASE, LATEST, LORA, ONCE, SFT, Algorithm, DataFormat, Dtype, Use
from perlcli.settings.command_groups import LengthSettings
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
    Settings,
    Sft,
    Stage,
    Training,
    command_of,
)
from perlcli.settings.conflicts import check
from perlcli.settings.declaring import Option, dashed, names, options
from perlcli.settings.precedence import GENERAL, LEARNING_RATES, RL_ACCUMULATION, layered, resolve
from perlcli.settings.stage_groups import DataSettings, LoraSettings, ModelSettings
from perlcli.settings.values import limit_faults, misfit, place_fault

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
    "DataFormat",
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
    "Settings",
    "Sft",
    "Stage",
    "Training",
    "Use",
    "build",
    "check",
    "command_of",
    "dashed",
    "flat",
    "layered",
    "limit_faults",
    "misfit",
    "names",
    "options",
    "place_fault",
    "resolve",
]
