"""The commands, each with its groups of options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perlcli.settings.command_groups import (
    ComparedLoraSettings,
    ComparedModelSettings,
    ComparedRunSettings,
    CompareSettings,
    ConvertRunSettings,
    ConvertSettings,
    DoctorSettings,
    EstimateModelSettings,
    EstimateRlSettings,
    EstimateSettings,
    EstimateTrainSettings,
    FileSettings,
    LengthSettings,
    ListSettings,
    MergeRunSettings,
    MergeSettings,
    QuickstartSettings,
    ReportRunSettings,
    RunsSettings,
    ShowSettings,
    TokenizerSettings,
)
from perlcli.settings.stage_groups import (
    DataSettings,
    EvalSettings,
    HeldOutSettings,
    KeepSettings,
    LoraSettings,
    ModelSettings,
    RecipeSettings,
    RlSettings,
    RunSettings,
    SamplingSettings,
    ThumbsSettings,
    TrainSettings,
)


@dataclass(frozen=True)
class Sft:
    """Settings of `perl sft`."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()
    keep: KeepSettings = KeepSettings()


@dataclass(frozen=True)
class Reward:
    """Settings of `perl reward`."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    thumbs: ThumbsSettings = ThumbsSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()
    keep: KeepSettings = KeepSettings()


@dataclass(frozen=True)
class Rl:
    """Settings of `perl rl`."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sampling: SamplingSettings = SamplingSettings()
    rl: RlSettings = RlSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()
    keep: KeepSettings = KeepSettings()


@dataclass(frozen=True)
class Eval:
    """Settings of `perl eval`."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sampling: SamplingSettings = SamplingSettings()
    eval: EvalSettings = EvalSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: RunSettings = RunSettings()


@dataclass(frozen=True)
class Merge:
    """Settings of `perl merge`."""

    merge: MergeSettings = MergeSettings()
    run: MergeRunSettings = MergeRunSettings()


@dataclass(frozen=True)
class Quickstart:
    """Settings of `perl quickstart`."""

    quickstart: QuickstartSettings = QuickstartSettings()
    run: RunSettings = RunSettings()


@dataclass(frozen=True)
class CompareFull:
    """Settings of `perl compare-full`."""

    compare: CompareSettings = CompareSettings()
    model: ComparedModelSettings = ComparedModelSettings()
    data: DataSettings = DataSettings()
    held_out: HeldOutSettings = HeldOutSettings()
    thumbs: ThumbsSettings = ThumbsSettings()
    sampling: SamplingSettings = SamplingSettings()
    rl: RlSettings = RlSettings()
    lora: ComparedLoraSettings = ComparedLoraSettings()
    train: TrainSettings = TrainSettings()
    recipe: RecipeSettings = RecipeSettings()
    run: ComparedRunSettings = ComparedRunSettings()
    keep: KeepSettings = KeepSettings()


@dataclass(frozen=True)
class DataCheck:
    """Settings of `perl data check`."""

    file: FileSettings = FileSettings()
    model: TokenizerSettings = TokenizerSettings()
    length: LengthSettings = LengthSettings()


@dataclass(frozen=True)
class DataShow:
    """Settings of `perl data show`."""

    file: FileSettings = FileSettings()
    show: ShowSettings = ShowSettings()
    model: TokenizerSettings = TokenizerSettings()
    length: LengthSettings = LengthSettings()


@dataclass(frozen=True)
class DataConvert:
    """Settings of `perl data convert`."""

    file: FileSettings = FileSettings()
    convert: ConvertSettings = ConvertSettings()
    run: ConvertRunSettings = ConvertRunSettings()


@dataclass(frozen=True)
class Report:
    """Settings of `perl report`."""

    runs: RunsSettings = RunsSettings()
    run: ReportRunSettings = ReportRunSettings()


@dataclass(frozen=True)
class Estimate:
    """Settings of `perl estimate`."""

    estimate: EstimateSettings = EstimateSettings()
    model: EstimateModelSettings = EstimateModelSettings()
    train: EstimateTrainSettings = EstimateTrainSettings()
    rl: EstimateRlSettings = EstimateRlSettings()


@dataclass(frozen=True)
class Runs:
    """Settings of `perl runs`."""

    runs: ListSettings = ListSettings()


@dataclass(frozen=True)
class Doctor:
    """Settings of `perl doctor`."""

    doctor: DoctorSettings = DoctorSettings()


Training = Sft | Reward | Rl
Stage = Training | Eval | Merge | Quickstart | CompareFull
OfData = DataCheck | DataShow | DataConvert
Settings = Stage | OfData | Report | Estimate | Runs | Doctor
COMMANDS: dict[str, type[Any]] = {
    "sft": Sft,
    "reward": Reward,
    "rl": Rl,
    "eval": Eval,
    "merge": Merge,
    "quickstart": Quickstart,
    "compare-full": CompareFull,
}
DATA_COMMANDS: dict[str, type[Any]] = {"data check": DataCheck, "data show": DataShow, "data convert": DataConvert}
# Commands that do not create a run.
RUNLESS_COMMANDS: dict[str, type[Any]] = {"runs": Runs, "report": Report, "estimate": Estimate, "doctor": Doctor}
ALL_COMMANDS = COMMANDS | RUNLESS_COMMANDS | DATA_COMMANDS


def command_of(settings: Settings | type[Any]) -> str:
    """The command that these settings belong to, from the object or its class."""
    kind = settings if isinstance(settings, type) else type(settings)
    return next(name for name, stage in ALL_COMMANDS.items() if stage is kind)
