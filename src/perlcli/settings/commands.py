"""The commands, each with its groups of options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perlcli.settings.groups import (
    ComparedLoraSettings,
    ComparedModelSettings,
    ComparedRunSettings,
    CompareSettings,
    ConvertRunSettings,
    ConvertSettings,
    DataSettings,
    DoctorSettings,
    EstimateModelSettings,
    EstimateRlSettings,
    EstimateSettings,
    EstimateTrainSettings,
    EvalSettings,
    FileSettings,
    HeldOutSettings,
    KeepSettings,
    LengthSettings,
    ListSettings,
    LoraSettings,
    MergeRunSettings,
    MergeSettings,
    ModelSettings,
    QuickstartSettings,
    RecipeSettings,
    ReportRunSettings,
    RlSettings,
    RunSettings,
    RunsSettings,
    SamplingSettings,
    ShowSettings,
    ThumbsSettings,
    TokenizerSettings,
    TrainSettings,
)


@dataclass(frozen=True)
class Sft:
    """Settings of `perl sft`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class Reward:
    """Settings of `perl reward`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    thumbs: ThumbsSettings = field(default_factory=ThumbsSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class Rl:
    """Settings of `perl rl`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    rl: RlSettings = field(default_factory=RlSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class Eval:
    """Settings of `perl eval`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class Merge:
    """Settings of `perl merge`."""

    merge: MergeSettings = field(default_factory=MergeSettings)
    run: MergeRunSettings = field(default_factory=MergeRunSettings)


@dataclass(frozen=True)
class Quickstart:
    """Settings of `perl quickstart`."""

    quickstart: QuickstartSettings = field(default_factory=QuickstartSettings)
    run: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class CompareFull:
    """Settings of `perl compare-full`."""

    compare: CompareSettings = field(default_factory=CompareSettings)
    model: ComparedModelSettings = field(default_factory=ComparedModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    thumbs: ThumbsSettings = field(default_factory=ThumbsSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    rl: RlSettings = field(default_factory=RlSettings)
    lora: ComparedLoraSettings = field(default_factory=ComparedLoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    run: ComparedRunSettings = field(default_factory=ComparedRunSettings)
    keep: KeepSettings = field(default_factory=KeepSettings)


@dataclass(frozen=True)
class DataCheck:
    """Settings of `perl data check`."""

    file: FileSettings = field(default_factory=FileSettings)
    model: TokenizerSettings = field(default_factory=TokenizerSettings)
    length: LengthSettings = field(default_factory=LengthSettings)


@dataclass(frozen=True)
class DataShow:
    """Settings of `perl data show`."""

    file: FileSettings = field(default_factory=FileSettings)
    show: ShowSettings = field(default_factory=ShowSettings)
    model: TokenizerSettings = field(default_factory=TokenizerSettings)
    length: LengthSettings = field(default_factory=LengthSettings)


@dataclass(frozen=True)
class DataConvert:
    """Settings of `perl data convert`."""

    file: FileSettings = field(default_factory=FileSettings)
    convert: ConvertSettings = field(default_factory=ConvertSettings)
    run: ConvertRunSettings = field(default_factory=ConvertRunSettings)


@dataclass(frozen=True)
class Report:
    """Settings of `perl report`."""

    runs: RunsSettings = field(default_factory=RunsSettings)
    run: ReportRunSettings = field(default_factory=ReportRunSettings)


@dataclass(frozen=True)
class Estimate:
    """Settings of `perl estimate`."""

    estimate: EstimateSettings = field(default_factory=EstimateSettings)
    model: EstimateModelSettings = field(default_factory=EstimateModelSettings)
    train: EstimateTrainSettings = field(default_factory=EstimateTrainSettings)
    rl: EstimateRlSettings = field(default_factory=EstimateRlSettings)


@dataclass(frozen=True)
class Runs:
    """Settings of `perl runs`."""

    runs: ListSettings = field(default_factory=ListSettings)


@dataclass(frozen=True)
class Doctor:
    """Settings of `perl doctor`."""

    doctor: DoctorSettings = field(default_factory=DoctorSettings)


Training = Sft | Reward | Rl
Stage = Training | Eval | Merge | Quickstart | CompareFull
OfData = DataCheck | DataShow | DataConvert
COMMANDS: dict[str, type[Any]] = {
    "sft": Sft, "reward": Reward, "rl": Rl, "eval": Eval, "merge": Merge, "quickstart": Quickstart,
    "compare-full": CompareFull,
}  # fmt: skip

DATA_COMMANDS: dict[str, type[Any]] = {"data check": DataCheck, "data show": DataShow, "data convert": DataConvert}
# They leave no run.
RUNLESS_COMMANDS: dict[str, type[Any]] = {"runs": Runs, "report": Report, "estimate": Estimate, "doctor": Doctor}
ALL_COMMANDS = COMMANDS | RUNLESS_COMMANDS | DATA_COMMANDS


def command_of(settings: Stage | OfData | Report | type[Any]) -> str:
    """The command whose settings these are."""
    kind = settings if isinstance(settings, type) else type(settings)
    return next(name for name, stage in ALL_COMMANDS.items() if stage is kind)
