"""`perl rl` quotes what is known of its reward before it loads weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perlcli.run.record import read_record

Perl = Callable[..., Any]
GOOD = {"rows": 300, "accuracy": 0.8, "accuracy_low": 0.75, "accuracy_high": 0.84}
BAD = {"rows": 300, "accuracy": 0.48, "accuracy_low": 0.43, "accuracy_high": 0.53}


@pytest.fixture
def dry(perl: Perl, llama: Path, rows: dict[str, Path]) -> Callable[..., Any]:
    """Runs `perl rl --dry-run` with a reward."""

    def run(reward: object, *words: object, code: int = 0) -> Any:
        given = (
            "--reward",
            reward,
            "-d",
            rows["prompts"],
            "-o",
            "rl",
            "--max-length",
            "128",
            "--dry-run",
            "--max-completion-length",
            "12",
        )
        return perl("rl", "-m", llama, *given, *words, code=code)

    return run


@pytest.fixture
def reward_with(reward_run: Path) -> Callable[[dict[str, Any]], Path]:
    """A copy of the reward run whose record has other metrics."""

    def make(metrics: dict[str, Any]) -> Path:
        folder = Path("runs/judge").absolute()
        shutil.copytree(reward_run, folder)
        record = json.loads((folder / "record.json").read_text())
        (folder / "record.json").write_text(json.dumps(record | {"metrics": metrics}))
        return folder

    return make


def evaluation(of: Path, metrics: dict[str, Any], name: str = "eval-judge", overlap: int = 0) -> None:
    """The record of `perl eval` of a reward, next to it."""
    from perlcli.model.weights import fingerprint

    record = json.loads((of / "record.json").read_text())
    record["model"] |= {"adapter": str(of), "adapter_fingerprint": fingerprint(str(of))}
    record |= {"command": "eval", "metrics": metrics, "settings": {}}
    record["data"]["eval"] = {"source": "dev.jsonl", "kept": 300, "overlap": {"count": overlap, "first_rows": []}}
    (of.parent / name).mkdir()
    (of.parent / name / "record.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_a_good_reward_is_quoted(dry: Any, reward_with: Any) -> None:
    folder = reward_with(GOOD)
    shown = dry(folder, "--strict").stdout
    assert f"The reward {folder}: Better than chance: yes. Accuracy 80 % (95 % interval 75 % to 84 %)" in shown
    assert "Warning" not in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metrics", "said"),
    [(BAD, "Better than chance: no. Accuracy 48 %"), ({}, "It was never measured on held-out rows.")],
)
def test_a_reward_that_is_not_known_to_be_good_is_a_warning_and_refused_by_strict(
    metrics: dict[str, Any], said: str, dry: Any, reward_with: Any
) -> None:
    folder = reward_with(metrics)
    shown = dry(folder).stdout
    assert f"Warning: The reward {folder} was not shown to be better than chance, so the policy may learn" in shown
    assert said in shown
    refused = dry(folder, "--strict", code=2).stderr
    assert f"Error: --strict: the reward {folder} was not shown to be better than chance. {said}" in refused
    assert f"perl eval --model {folder}" in refused


def test_an_evaluation_next_to_the_reward_counts_if_it_has_more_rows(dry: Any, reward_with: Any) -> None:
    folder = reward_with({})
    evaluation(folder, GOOD)
    assert "Better than chance: yes." in dry(folder, "--strict").stdout
    evaluation(folder, BAD | {"rows": 900}, "eval-more")
    assert "Better than chance: no." in dry(folder).stdout


@pytest.mark.slow
def test_an_evaluation_on_training_prompts_or_of_other_weights_does_not_count(dry: Any, reward_with: Any) -> None:
    folder = reward_with({})
    evaluation(folder, GOOD, overlap=300)
    assert "never measured" in dry(folder).stdout
    shutil.rmtree("runs/eval-judge")
    evaluation(folder, GOOD)
    path = Path("runs/eval-judge/record.json")
    path.write_text(path.read_text().replace('"adapter_fingerprint": "', '"adapter_fingerprint": "0'))
    assert "never measured" in dry(folder).stdout
    path.write_text("{")  # damaged: not this run's business
    assert "never measured" in dry(folder).stdout


@pytest.mark.slow
def test_a_merged_reward_has_the_verdict_of_its_adapter(dry: Any, perl: Perl, reward_with: Any) -> None:
    folder = reward_with(GOOD)
    perl("merge", folder, "-o", "runs/merged")
    assert "The reward runs/merged: Better than chance: yes." in dry("runs/merged", "--strict").stdout


def test_rewards_from_elsewhere_get_a_note_and_functions_none(dry: Any, classifier: Path) -> None:
    shown = dry(classifier, "--strict").stdout
    assert f"The reward {classifier} was not measured by perl." in shown
    assert "Warning" not in shown
    assert "measured" not in dry("perlcli.coffee:reward", "--strict").stdout


def test_the_record_of_rl_has_the_verdicts_of_its_reward_and_of_its_steps(rl_run: Path, reward_run: Path) -> None:
    found = read_record(rl_run)
    assert found.verdicts[0].startswith(f"The reward {reward_run}: Better than chance: ")
    assert found.verdicts[1] == "Reward rose beyond noise: can't say from 2 steps; 20 are needed."
