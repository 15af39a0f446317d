"""`perl report`: finished runs side by side, seeds as one arm; a comparison's files from its JSON; clear refusals."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli.commands import report
from perlcli.comparison import results
from perlcli.comparison.render import files as render_files
from perlcli.comparison.render import words
from perlcli.comparison.results import Report
from perlcli.run.files import METRICS, RECORD, write_json
from perlcli.run.metrics import STEP, STEP_CPU
from perlcli.run.record import RunRecord

Make = Callable[..., Path]
LORA = {"lora_r": 8, "full": False, "learning_rate": 1e-3, "max_length": 128}
FULL = LORA | {"lora_r": None, "full": True, "learning_rate": 1e-4}
FORMS = {"report.json", "report.md", "report.csv", "report-runs.csv", "report.html"}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a run's folder, by default of a LoRA reward model, whose steps take a second each."""

    def run(name: str, settings: Any = None, seed: int = 0, seconds: float = 1.0, **values: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        record = RunRecord(
            **{
                "command": "reward",
                "status": "finished",
                "seed": seed,
                "steps": 4,
                "started": "2026-01-02T03:04:05+00:00",
                "settings": {**(settings or LORA), "seed": seed, "output": str(folder)},
                "model": {"base": "org/base"},
                "device": {"precision": "float32"},
                "memory": {"training_mb": 500 * seconds},
                "elapsed_seconds": 5.0,
                "metrics": {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9, "rows": 100},
                **values,
            }
        )
        write_json(folder / RECORD, dataclasses.asdict(record))
        rows = [
            {"step": n, STEP: seconds, STEP_CPU: seconds, "num_tokens": 10 * n, "loss": 1 / n} for n in (1, 2, 3, 4)
        ]
        (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return run


def built(*folders: Path) -> Report:
    return report.of_runs(report.read_runs([str(folder) for folder in folders]), None)


def test_runs_stand_side_by_side_with_full_tuning_as_the_baseline(make: Make) -> None:
    found = built(make("lora"), make("full", FULL, seconds=2.0), make("r4", LORA | {"lora_r": 4}))
    (comparison,) = found.comparisons
    assert [(arm.name, arm.kind, arm.rank, arm.is_baseline) for arm in comparison.arms] == [
        ("full", "full", None, True),
        ("lora", "lora", 8, False),
        ("r4", "lora", 4, False),
    ]
    lora = comparison.arms[1]
    assert (lora.ratios["memory"], lora.ratios["speed"], lora.learning_rate) == (0.5, 2.0, 1e-3)
    assert (lora.model, lora.precision) == ("org/base", "float32")
    assert comparison.warnings == []
    assert (found.title, found.elapsed_seconds, found.status) == ("3 runs side by side", 15.0, "finished")
    assert found.command.startswith("perl report /") and found.started == "2026-01-02T03:04:05+00:00"


def test_without_full_tuning_the_first_run_is_the_baseline_of_its_model(make: Make) -> None:
    large = {"model": {"base": "org/large"}}
    found = built(make("a"), make("b", LORA | {"lora_r": 4}), make("c", **large), make("d", FULL, **large))
    assert [(arm.name, arm.is_baseline) for arm in found.comparisons[0].arms] == [
        ("a", True),
        ("b", False),
        ("d", True),
        ("c", False),
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_arm(make: Make) -> None:
    accuracies = [{"metrics": {"accuracy": value}} for value in (0.7, 0.8, 0.9)]
    runs = [make(f"lora-s{seed}", seed=seed, **accuracies[seed]) for seed in range(3)]
    (arm,) = built(*runs).comparisons[0].arms
    assert arm.name == "lora"
    assert arm.quality["accuracy"] == results.Spread(pytest.approx(0.8), 0.7, 0.9, 3)
    again = make("again", seed=1)
    assert [(run.seed, run.repeat) for run in built(*runs, again).comparisons[0].arms[0].runs][2:] == [(2, 1), (1, 2)]


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([["runs/a"], ["runs/b"]], ["a", "b"]),
        ([["one/a"], ["two/a"]], ["one/a", "two/a"]),
        ([["runs/lora-s0", "runs/lora-s1"]], ["lora"]),
        ([["runs/lora_seed1", "runs/lora_seed2"]], ["lora"]),
        ([["s0/lora", "s1/lora"], ["s0/full", "s1/full"]], ["lora", "full"]),
        ([["runs/bias0", "runs/bias1"]], ["bias"]),
        ([["x", "y"]], ["x"]),
        ([["r/a-1", "r/a-2"], ["r/a-3", "r/a-4"]], ["a (1)", "a (2)"]),
        ([["."], ["x"]], [None, "x"]),
    ],
)
def test_arms_are_named_by_their_folders(groups: list[list[str]], names: list[str | None], tmp_path: Path) -> None:
    assert report.arm_names(groups) == [name or tmp_path.name for name in names]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, "-"),
        ({"full": True}, "full"),
        ({"full": False}, "lora"),
        ({"full": False, "use_dora": True}, "dora"),
        ({"full": False, "peft": "ia3.json"}, "ia3.json"),
    ],
)
def test_how_a_run_trained(values: dict[str, Any], kind: str) -> None:
    assert report.kind_of(values) == kind


def test_each_stage_is_a_comparison_of_its_own_and_an_evaluation_knows_its_run(make: Make) -> None:
    trained = make("full", FULL)
    evaluated = {"command": "eval", "metrics": {"accuracy": 0.5}}
    measured = make("eval-full", {"model": str(trained), "data": "x"}, **evaluated)
    other = make("eval-other", {"model": "org/hub", "data": "x"}, **evaluated)
    found = built(measured, trained, other)
    assert [comparison.stage for comparison in found.comparisons] == ["reward", "eval"]
    assert [(arm.name, arm.kind) for arm in found.comparisons[1].arms] == [("eval-full", "full"), ("eval-other", "-")]
    assert found.comparisons[1].warnings == []


def test_what_full_tuning_left_is_of_the_model_that_was_tuned(make: Make) -> None:
    first = make("sft-full", FULL, command="sft")
    later = make("rl-full", FULL, command="rl", model={"base": str(first)})
    found = built(make("rl", LORA, command="rl"), later)
    assert {arm.model for arm in found.comparisons[0].arms} == {"org/base"}
    assert found.comparisons[0].arms[1].ratios["speed"] == 1


def test_a_model_that_names_itself_is_no_endless_search(make: Make, tmp_path: Path) -> None:
    folder = make("loop", model={"base": str(tmp_path / "loop")})
    assert built(folder).comparisons[0].arms[0].model == str(folder)


def test_in_what_else_runs_differ_is_warned_of(make: Make) -> None:
    found = built(make("full", FULL | {"max_length": 64}), make("a"), make("b", LORA | {"lora_r": 2}))
    assert found.comparisons[0].warnings == ["The runs differ in max_length: 64 in full; 128 in a, b"]
    other = make("other", LORA | {"max_length": 32}, model={"base": "org/other"})
    assert built(Path("a").absolute(), other).comparisons[0].warnings == []  # other models have other tokens


def test_runs_that_did_not_end_stand_there_with_the_reason(make: Make, perl: Any) -> None:
    names = ("going", "memory", "broke", "stopped")
    make("done", FULL)
    make("going", LORA | {"lora_r": 1}, status="running")
    make(
        "memory", LORA | {"lora_r": 2}, status="failed", failure="OutOfMemoryError: no", memory={"training_mb": 79_200}
    )
    make("broke", LORA | {"lora_r": 3}, status="failed", failure="loss is no number")
    make("stopped", LORA | {"lora_r": 4}, status="interrupted")
    text = perl("report", "done", *names).stdout
    for line in (
        "going    still running, or killed",
        "memory   out of memory at 79.2 GB",
        "broke    failed: loss is no number",
        "stopped  interrupted",
    ):
        assert f"\n{line}\n" in text
    alone = perl("report", "broke").stdout
    assert "No run finished: broke: failed: loss is no number." in alone and "Saved in" not in alone


@pytest.mark.slow
def test_one_run_says_again_what_it_said_at_its_end(reward_run: Path, perl: Any) -> None:
    text = perl("report", reward_run).stdout
    assert f"Saved in {reward_run}\n\nReward model\n" in text
    assert "of full" not in text and "In the paper" not in text


@pytest.mark.slow
def test_runs_of_the_tool_itself_are_rendered_with_all_files(
    sft_run: Path, reward_run: Path, rl_run: Path, perl: Any, tmp_path: Path, files: Any
) -> None:
    text = perl("report", sft_run, reward_run, rl_run, "-o", "out").stdout
    assert f"Written to out: {render_files.PAGE}" in text
    plots = {f"plots/{stage}-{name}.png" for stage in ("sft", "reward", "rl") for name in ("cost", "curves")}
    assert files(tmp_path / "out") == FORMS | plots | {"plots/rl-phases.png"}
    found = results.read(tmp_path / "out" / "report.json")
    runs = [run for comparison in found.comparisons for arm in comparison.arms for run in arm.runs]
    assert [(tmp_path / "out" / run.folder).resolve() for run in runs] == [sft_run, reward_run, rl_run]
    assert all(run.memory_mb and run.step_seconds and run.metrics and run.weights_bytes for run in runs)
    assert set(runs[2].phases) == {"sampling", "scoring", "anchor", "learning"}
    perl("report", sft_run, "-o", "out")  # an earlier report of this command is replaced
    assert len(results.read(tmp_path / "out" / "report.json").comparisons) == 1
    assert {name for name in files(tmp_path / "out") if name.startswith("plots")} < plots
    assert "reward" not in " ".join(files(tmp_path / "out"))


def test_a_comparison_is_rendered_again_from_its_json(make: Make, perl: Any, tmp_path: Path, files: Any) -> None:
    runs = [make("compare/runs/lora"), make("compare/runs/full", FULL)]
    found = built(*runs)
    found.command = "perl compare-full reward"
    for arm in found.comparisons[0].arms:
        arm.runs[0].folder = f"runs/{arm.name}"
    text = results.write(found)
    (tmp_path / "compare" / "report.json").write_text(text)
    assert "LoRA trains the reward model" in perl("report", "compare/").stdout
    assert (tmp_path / "compare" / "report.json").read_text() == text
    plots = {"plots/reward-cost.png", "plots/reward-curves.png"}
    assert {name for name in files(tmp_path / "compare") if not name.startswith("runs/")} >= FORMS | plots
    perl("report", "compare", "--output", "elsewhere/deep")
    moved = results.read(tmp_path / "elsewhere/deep/report.json")
    folder = moved.comparisons[0].arms[0].runs[0].folder
    assert folder == "../../compare/runs/full"
    assert "plots/reward-curves.png" in files(tmp_path / "elsewhere/deep")


def told(perl: Any, *words: object, code: int = 2) -> list[str]:
    return list(perl("report", *words, code=code).stderr.splitlines())


def test_no_folder_is_an_error_in_our_words(perl: Any) -> None:
    assert told(perl) == ["Error: perl report needs the folder of at least one run", "Hint: perl report runs/reward"]


def test_every_wrong_folder_is_told_at_once(make: Make, perl: Any, tmp_path: Path) -> None:
    make("good")
    make("merged", command="merge")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RECORD).write_text('{"schema')
    (tmp_path / "plain").mkdir()
    found = told(perl, "good", "merged", "broken", "plain", "nowhere")
    assert found[0].startswith("Error: merged is a run of perl merge, which perl report can't compare")
    assert found[1].startswith("Can't read broken/record.json")
    assert found[2:] == [
        "plain is not the folder of a run: it has no record.json",
        "There is no folder nowhere",
        "Hint: name the folders of perl sft, reward, rl or eval runs",
    ]


def policy_eval(model: str | None, gold: float, **values: Any) -> dict[str, Any]:
    """The values of an evaluation's run."""
    metrics = {"prompts": 40, "gold": gold, "gold_low": gold - 0.1, "gold_high": gold + 0.1, "mean_reward": gold * 2}
    settings = {"model": model, "data": None, "reward": ["runs/judge"], "output": "x"}
    data = {"eval": {"source": "rows.jsonl", "kept": 40, "fingerprint": "f", "format": "prompts"}}
    return {"command": "eval", "settings": settings, "metrics": metrics, "data": data, **values}


@pytest.fixture
def pipeline(make: Make) -> None:
    """A folder `runs` with a pipeline: sft, judge, rl and an evaluation of RL against the SFT policy."""
    make("runs/sft", command="sft", metrics={"eval_loss": 0.5}, data={"eval": {"kept": 12, "source": "d.jsonl"}})
    make("runs/judge", verdicts=["better than chance: yes"])
    of_rl = LORA | {"model": "runs/sft", "reward": ["runs/judge"]}
    make("runs/rl", of_rl, command="rl", metrics={"reward": 1.0, "kl_per_token": 0.1, "completion_length": 8.0})
    anchor = {"anchor_gold": 0.2, "anchor_mean_reward": 0.1, "kl_k1_per_sequence": 0.25}
    values = policy_eval("runs/rl", 0.6, notes=["anchor: the policy that RL started from"])
    values["metrics"] |= anchor
    make("runs/a-eval", **values)


def test_a_folder_of_runs_is_a_pipeline(pipeline: None, make: Make, perl: Any, tmp_path: Path) -> None:
    make("runs/merged", command="merge")
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken" / RECORD).write_text("{")
    text = perl("report", "runs", "-o", "out").stdout
    assert "Left out: runs/merged (perl merge)" in text
    assert "Left out: runs/broken (its record can't be read)" in text
    found = results.read(tmp_path / "out" / "report.json")
    assert [comparison.stage for comparison in found.comparisons] == ["sft", "reward", "rl", "eval"]
    assert found.title == "Gold: SFT 20.0%, RL 60.0%"
    assert [(row.name, row.run, row.prompts, row.figures["gold"], row.kl) for row in found.pipeline] == [
        ("SFT", "a-eval", 40, 0.2, None),
        ("RL", "a-eval", 40, 0.6, 0.25),
    ]
    assert "\nRL      60.0% (50.0% to 70.0%)" in text
    assert "- The reward runs/judge: better than chance: yes" in text
    for form in ("report.md", "report.html"):
        content = (tmp_path / "out" / form).read_text()
        assert "the policy that RL started from" in content
        assert "The reward runs/judge: better than chance: yes" in content


def test_a_run_of_its_own_counts_before_what_another_measured_of_its_anchor(
    pipeline: None, make: Make, tmp_path: Path
) -> None:
    make("runs/b-eval", **policy_eval("runs/sft", 0.3))
    make("runs/c-eval", **policy_eval(None, 0.1))
    names = [f"runs/{name}" for name in ("a-eval", "b-eval", "c-eval", "rl")]
    found = report.of_runs(report.read_runs(names), None).pipeline
    assert [(row.name, row.figures["gold"]) for row in found] == [("base", 0.1), ("SFT", 0.3), ("RL", 0.6)]
    measured = report.of_runs(report.read_runs(report.expanded("runs")), None).comparisons[-1]
    assert words.chosen(measured) is measured.arms[-1]
    assert [Path(name).name for name in report.expanded("runs")][-3:] == ["c-eval", "b-eval", "a-eval"]


def test_rl_that_nothing_evaluates_has_the_figures_of_its_training(pipeline: None, make: Make) -> None:
    make("runs/b-eval", **policy_eval("runs/sft", 0.3))
    found = report.of_runs(report.read_runs(["runs/b-eval", "runs/rl"]), None).pipeline
    assert [(row.name, row.prompts) for row in found] == [("SFT", 40), ("RL, in training", None)]
    assert (found[1].figures["mean_reward"], found[1].kl) == (1.0, pytest.approx(0.8))


def test_other_data_opponents_and_judges_are_warned_of(make: Make) -> None:
    other = policy_eval("org/b", 0.3, notes=["anchor: the base"])
    other["data"]["eval"] |= {"source": "other.jsonl", "kept": 7, "fingerprint": "g"}
    other["settings"]["reward"] = ["runs/other"]
    make("one", **policy_eval("org/a", 0.5))
    make("two", **other)
    found = report.of_runs(report.read_runs(["one", "two"]), None).comparisons[0].warnings
    assert found == [
        "The runs were measured on different rows: rows.jsonl, 40 rows (prompts) in one; other.jsonl, 7 rows "
        "(prompts) in two",
        "The runs differ in opponent: none in one; the base in two",
        'The runs differ in judge: ["runs/judge"] in one; ["runs/other"] in two',
    ]


def test_the_same_rows_at_another_path_are_no_difference(make: Make) -> None:
    make("one", **policy_eval("org/a", 0.5))
    moved = policy_eval("org/b", 0.3)
    moved["settings"]["data"] = "elsewhere/rows.jsonl"
    make("two", **moved)
    assert report.of_runs(report.read_runs(["one", "two"]), None).comparisons[0].warnings == []


def test_a_moved_run_is_shown_where_it_is(make: Make, perl: Any, tmp_path: Path) -> None:
    make("old").rename(tmp_path / "new")
    text = perl("report", "new").stdout
    assert "Saved in new\n" in text and "old" not in text


def test_only_what_was_written_is_named(make: Make, perl: Any) -> None:
    make("broke", status="failed", failure="no")
    (Path("broke") / METRICS).unlink()
    assert perl("report", "broke", "-o", "out").stdout.endswith("report.json, report.csv, report-runs.csv\n")


def test_a_broken_report_is_told(perl: Any, tmp_path: Path) -> None:
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "report.json").write_text("{")
    assert told(perl, "compare")[0].startswith("Error: Can't read compare/report.json")


def test_nothing_but_an_earlier_report_is_written_over(make: Make, perl: Any, tmp_path: Path) -> None:
    run = make("run")
    (tmp_path / "file").write_text("")
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "report.json").write_text(results.write(Report(command="perl compare-full reward")))
    for place in ("run", "compare"):
        before = sorted(os.listdir(place))
        assert (
            told(perl, run, "-o", place)[0] == f"Error: --output {place} is not empty, and not a report of perl report"
        )
        assert sorted(os.listdir(place)) == before
    assert told(perl, run, "-o", "file")[0] == "Error: --output file is a file"
    assert (
        told(perl, "compare", run)[0]
        == "Error: compare is the folder of a comparison, which can only be shown on its own"
    )


def test_the_table_is_as_wide_as_the_terminal(make: Make, perl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make("lora")
    make("full", FULL)
    widths = {}
    for columns in ("40", "80", "100", "250"):
        monkeypatch.setenv("COLUMNS", columns)
        widths[columns] = max(map(len, perl("report", "lora", "full").stdout.splitlines()))
    assert widths["40"] == widths["80"] <= 80 and widths["100"] == widths["250"] <= 100


def test_runs_stand_in_a_config_too(make: Make, perl: Any, tmp_path: Path) -> None:
    make("lora")
    (tmp_path / "report.yaml").write_text("run: [lora]\noutput: out\n")
    perl("report", "--config", "report.yaml")
    assert (tmp_path / "out" / "report.html").exists()


def test_its_help_names_the_runs(perl: Any) -> None:
    text = perl("report", "--help").stdout
    assert "report [OPTIONS] RUN...\n" in text and "\n  RUN...  Folders of runs" in text
    for item in ("--output", "--config", "--debug"):
        assert item in text
