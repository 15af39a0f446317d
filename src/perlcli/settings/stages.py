"""The settings of the stages: sft, reward, rl and eval. The docstring of a group is its title in the help, and that of
a command is its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from perlcli.settings.declaring import flag, option, option_of, place
from perlcli.settings.running import KeepSettings, RecipeSettings, RunSettings
from perlcli.settings.sampling import (
    EvalSettings,
    ImportanceSettings,
    RlSettings,
    RolloutSettings,
    SamplingSettings,
    SharingSettings,
)

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Checkpointing = Literal["auto", "true", "false"]
OnLong = Literal["drop", "truncate", "error"]
Use = Literal["sft", "reward", "rl"]
LossOn = Literal["assistant", "all", "last"]
# The names of `data.formats.FORMATS`, in the same order.
ListFormat = Literal["hh", "openai-preferences", "rewardbench-2", "rm-bench"]
PairFormat = Literal["alpaca-pairs", "argilla-pairs", "sharegpt-pairs", "chat-pairs", "orca-pairs", "pairs"]
ComparedFormat = Literal["shp", "summarize-from-feedback", "webgpt", "helpsteer3", "helpsteer2-preference"]
BetterFormat = Literal["pku-saferlhf", "stack-exchange-paired", "stack-exchange", "judgebench", "arena", "arena-55k"]
RankedFormat = Literal["nectar", "ultrafeedback", "helpsteer2"]
LabelledFormat = Literal["argilla", "argilla-hub", "label-studio", "label-studio-min", "verdicts", "taskmaster"]
ThumbsFormat = Literal["thumbs", "alpaca-thumbs", "sharegpt-thumbs", "chat-thumbs", "orca-thumbs", "scored"]
ChatFormat = Literal["android-control", "prompt-completion", "messages", "sharegpt"]
TextFormat = Literal["taskmaster-dialogs", "alpaca", "dolly", "orca", "tldr", "prompts", "text"]
Compared = Literal[ListFormat, PairFormat, ComparedFormat, BetterFormat, RankedFormat]
DataFormat = Literal[Compared, LabelledFormat, ThumbsFormat, ChatFormat, TextFormat]
Pairs = Literal["all", "best-worst"]
ATTENTION = "attention"
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")


@dataclass(frozen=True)
class ModelSettings:
    """Model"""

    model: str | None = place("Model or adapter: Hub id or local folder.", short="-m", unset="the embedded coffee base")
    dtype: Dtype = option(
        "Precision of the base; auto is bfloat16 on a GPU or when quantised, float32 otherwise.", default="auto"
    )
    load_in_4bit: bool = flag("Quantise the frozen base to 4 bits (NF4).")
    load_in_8bit: bool = flag("Quantise the frozen base to 8 bits (LLM.int8).")
    trust_remote_code: bool = flag("Run modelling code from the Hub repository.")
    strict: bool = flag(
        "Stop instead of warning if an adapter is used on its base in a different precision than it was trained in; "
        "rl: also if a reward model was not shown to be better than chance on held-out rows."
    )


@dataclass(frozen=True)
class DataSettings:
    """Data"""

    data: str | None = place(
        "Data: Hub id, local file or folder, or - for standard input.", short="-d", unset="the embedded coffee data"
    )
    data_format: DataFormat | None = option(
        "Format of the rows, held-out data included.", unset="detected from the columns"
    )
    columns: str | None = option(
        "Read other columns under the names of TRL's formats, held-out data included; nested ones by a dotted path.",
        unset="the names as they are",
        metavar="NAME=COLUMN,…",
    )
    label_map: str | None = option(
        "What labels mean: 1 is a thumbs up, 0 a thumbs down, none leaves the row out.",
        unset="up and down, good and bad, yes and no, 👍 and 👎 … are understood",
        metavar="LABEL=1,LABEL=0,…",
    )
    label_threshold: float | None = option(
        "Number from which on a label is a thumbs up, such as 4 of five stars; makes thumbs of scored answers too.",
        unset="labels are 0 or 1, scores make pairs",
    )
    score_field: str | None = option(
        "Score, attribute or question by which answers are compared, in formats that have several.",
        unset="the main one of the format",
    )
    pairs: Pairs = option("Pairs of a ranking: all, or only the best and the worst answer.", default="all")
    subset: str | None = option("Subset of a Hub dataset: a configuration or a folder.", unset="the default one")
    split: str | None = option("Split of a Hub dataset or of a folder.", unset="{}")
    shp_score_ratio: float | None = option(
        "Format shp: minimum ratio between the scores of the two comments; the dataset card uses 2.",
        unset="no limit",
        gt=0,
    )
    shp_per_post: int | None = option(
        "Format shp: maximum number of pairs per post; the dataset card uses 5.", unset="no limit", gt=0
    )
    max_length: int | None = option(
        "Maximum tokens per row, prompt and completion together; see --on-long.",
        unset="{}, or the model's context if that is shorter",
        gt=0,
    )
    on_long: OnLong | None = option(
        "What to do with rows longer than --max-length: drop them and report how many, truncate the prompt from the "
        "left (the completion is never cut), or stop with an error.",
        unset="drop, but stop if most rows are too long",
    )
    drop_duplicates: bool = flag("Drop rows that repeat an earlier one. Duplicates are always counted.")
    chat: bool | None = option(
        "Render the prompt of a text row as a user turn and its completion as the assistant's; --no-chat joins them as "
        "text.",
        unset="on with a chat template; as --model was trained",
    )
    chat_template: str | None = place("File with the chat template to use (Jinja).", unset="the model's own")
    chat_template_kwargs: str | None = option(
        "Variables for the chat template, as JSON or YAML; a row's own chat_template_kwargs come first. Example: "
        "'{enable_thinking: false}'.",
        unset="none; as --model was trained",
        metavar="JSON",
    )


@dataclass(frozen=True)
class LossSettings:
    """Data"""

    loss_on: LossOn = option(
        "What is learned: the assistant's turns (after the prompt, if rows have one), only the last of them, or all "
        "tokens. Messages with weight 0 are never learned.",
        default="assistant",
    )


@dataclass(frozen=True)
class TokenizerSettings:
    """Model"""

    model: str | None = place(
        "Model or adapter whose tokenizer and chat template render the rows: Hub id or local folder.",
        short="-m",
        unset="the embedded coffee base",
    )
    trust_remote_code: bool = option_of(ModelSettings, "trust_remote_code")
    chat: bool | None = option_of(DataSettings, "chat")
    chat_template: str | None = option_of(DataSettings, "chat_template")
    chat_template_kwargs: str | None = option_of(DataSettings, "chat_template_kwargs")
    loss_on: LossOn = option_of(LossSettings, "loss_on")


@dataclass(frozen=True)
class HeldOutSettings:
    """Data"""

    eval_data: str | None = place(
        "Held-out data to evaluate on at the end.", unset="the test split of --data, if it has one"
    )
    eval_fraction: float | None = option(
        "Hold out this share of --data instead. Rows are chosen by content, and rows with the same prompt stay "
        "together. 0 trains on all rows and evaluates on none.",
        unset="without a test split 5 % of the prompts, at least 32, if there are three times as many",
        ge=0,
        lt=1,
    )
    max_eval_samples: int | None = option(
        "Evaluate on at most this many held-out rows (the first ones).", unset="all; rl: 64 prompts", gt=0
    )


@dataclass(frozen=True)
class LoraSettings:
    """Adapter"""

    lora_r: int | None = option("Rank of the LoRA matrices.", unset="{}", gt=0)
    lora_alpha: int | None = option("Numerator of the LoRA scale (scale = alpha / r).", unset="2 x --lora-r", gt=0)
    lora_dropout: float | None = option("Dropout before the LoRA matrices.", unset="{}", ge=0, lt=1)
    lora_target_modules: str | None = option(
        "Modules to adapt: `attention` (all attention projections), `all-linear`, or module names, comma-separated.",
        unset="{}",
    )
    use_dora: bool = flag(
        "DoRA: the LoRA matrices learn the direction of each weight, and an extra vector learns its magnitude."
    )
    peft: str | None = place(
        "Use another adapter type instead of the --lora options: a JSON file like peft's adapter_config.json (LoHa, "
        "LoKr, …; see docs/adapters.md).",
        unset="LoRA",
    )
    full: bool = flag("Train all parameters, without an adapter.")


@dataclass(frozen=True)
class TrainSettings:
    """Training"""

    max_steps: int | None = option("Number of optimiser steps; overrides --num-train-epochs.", unset="by epochs", gt=0)
    num_train_epochs: float | None = option("Passes over the data.", unset="{}", gt=0)
    learning_rate: float | None = option("Peak learning rate.", unset="{}", gt=0)
    per_device_train_batch_size: int | None = option(
        "Batch size per device, in rows (rl: in completions).", unset="{}", gt=0
    )
    gradient_accumulation_steps: int | None = option("Batches per optimiser step.", unset="{}", gt=0)
    gradient_checkpointing: Checkpointing | None = option(
        "Compute activations again in the backward pass instead of keeping them: less memory, more time. auto is true "
        "on a GPU if the run is predicted not to fit without it.",
        unset="{}",
    )
    optim: str | None = option(
        "Optimiser, by its name in transformers (adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor, sgd, …).",
        unset="{}",
        metavar="NAME",
    )
    set: tuple[str, ...] = option(
        "Any other field of TRL's config; can be given several times.", default=(), metavar="NAME=VALUE"
    )


@dataclass(frozen=True)
class BatchSettings:
    """Training"""

    auto_batch: bool = flag(
        "Find the largest batch that fits: by the predicted memory, and by a step on the longest rows. The effective "
        "batch (batch size x accumulation) stays the same."
    )


@dataclass(frozen=True)
class ThumbsSettings:
    """Thumbs"""

    pos_weight: str | float = option(
        "Weight of thumbs-up rows in the loss; auto is the number of thumbs down per thumb up.",
        default="auto",
        metavar="[auto|none|X]",
    )


@dataclass(frozen=True)
class Sft:
    """Fine-tune on demonstrations: gives the policy that RL starts from, and its anchor.

    Example: perl sft --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --output runs/sft"""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    loss: LossSettings = LossSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    batch: BatchSettings = BatchSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()
    keep: KeepSettings = KeepSettings()


@dataclass(frozen=True)
class Reward:
    """Train a reward model on pairs (chosen, rejected) or on thumbs up or down (prompt, completion, label).

    Example: perl reward --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --output runs/reward"""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    thumbs: ThumbsSettings = ThumbsSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    sharing: SharingSettings = SharingSettings()
    batch: BatchSettings = BatchSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()
    keep: KeepSettings = KeepSettings()


@dataclass(frozen=True)
class Rl:
    """Train the policy with RL (RLOO or the paper's REINFORCE) on a reward, with a KL penalty towards its anchor.

    Example: perl rl --model runs/sft --reward runs/reward --data prompts.jsonl --output runs/rl"""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sampling: SamplingSettings = SamplingSettings()
    rl: RlSettings = RlSettings()
    rollouts: RolloutSettings = RolloutSettings()
    importance: ImportanceSettings = ImportanceSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    sharing: SharingSettings = SharingSettings()
    batch: BatchSettings = BatchSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()
    keep: KeepSettings = KeepSettings()


@dataclass(frozen=True)
class Eval:
    """Evaluate a reward model on held-out preferences, or a policy against its anchor.

    Examples: perl eval --model runs/reward --data dev.jsonl; perl eval --model runs/rl --reward runs/reward"""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sampling: SamplingSettings = SamplingSettings()
    eval: EvalSettings = EvalSettings()
    rollouts: RolloutSettings = RolloutSettings()
    sharing: SharingSettings = SharingSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()


Training = Sft | Reward | Rl
