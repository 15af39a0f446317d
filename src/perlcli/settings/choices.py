"""The choices and words that options share."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Algorithm = Literal["rloo", "reinforce"]
OnLong = Literal["drop", "truncate", "error"]
Use = Literal["sft", "reward", "rl"]
Compared = Literal["sft", "reward", "rl", "all"]
# The names of `data.formats.FORMATS`, in the same order.
DataFormat = Literal[
    "hh",
    "pairs",
    "shp",
    "summarize-from-feedback",
    "taskmaster",
    "thumbs",
    "android-control",
    "prompt-completion",
    "messages",
    "sharegpt",
    "taskmaster-dialogs",
    "alpaca",
    "tldr",
    "prompts",
    "text",
]
ATTENTION = "attention"
LATEST = "latest"  # what --resume means without a checkpoint
SFT, BASE = "sft", "base"  # the anchors that have a name
ONCE = ("dry_run", "overwrite", "resume")  # apply to one call and do not describe the run
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
