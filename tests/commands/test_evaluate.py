"""`perl eval`: a reward model on held-out rows; a policy against its anchor."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TWO_STEPS

from perlcli import coffee, data
from perlcli.commands import evaluate
from perlcli.model import loading, roles
from perlcli.model.sources import locate
from perlcli.run.record import read_record
from perlcli.settings import LoraSettings, ModelSettings
from perlcli.training import policies, sampling

Perl = Callable[..., Any]
RUN = {"record.json", "settings.yaml", "samples.jsonl"}
BRIEF = ("--max-completion-length", "6", "--max-length", "128")
QUALITY = {"mean_reward", "gold", "gold_low", "gold_high"}
WRITTEN = {"prompts", "mean_length", "share_truncated", "distinct_1", "distinct_2"}
AGAINST = {"wins", "wins_low", "wins_high", "share_ties"} | {f"anchor_{name}" for name in QUALITY}
KL = {f"kl_{kind}_per_{unit}" for kind in ("k1", "k3") for unit in ("token", "sequence")}


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def measured(perl: Perl, reward_run: Path, rows: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """Runs `perl eval` of a policy on the held-out prompts, and returns its metrics."""

    def run(model: Path, *words: object, output: str = "run") -> dict[str, Any]:
        perl("eval", "-m", model, "--reward", reward_run, "-d", rows["prompts"], "-o", output, *BRIEF, *words)
        return read_record(Path(output)).metrics

    return run


@pytest.fixture
def fresh(llama: Path, tmp_path: Path) -> Path:
    """The folder of an adapter that was never trained, which writes what the base writes."""
    lora = LoraSettings(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="attention")
    model = roles.new_adapter(loading.load_causal(locate(str(llama)), ModelSettings()), lora, "CAUSAL_LM")
    roles.save_adapter(model, tmp_path / "fresh")
    return tmp_path / "fresh"


# A reward model


@pytest.mark.parametrize("kind", ["pairs", "thumbs"])
def test_reward_model_has_the_metrics_of_its_training(
    kind: str, perl: Perl, rows: dict[str, Path], request: pytest.FixtureRequest, files: Callable[[Path], set[str]]
) -> None:
    trained = request.getfixturevalue({"pairs": "reward_run", "thumbs": "thumbs_run"}[kind])
    perl("eval", "-m", trained, "-d", rows[kind], "-o", "run")
    found, before = read_record(Path("run")), read_record(trained)
    training = {"reload_shift", "pos_weight"}
    held_out = {name: value for name, value in before.metrics.items() if not name.startswith("train_")}
    assert found.metrics == {name: value for name, value in held_out.items() if name not in training}
    assert found.verdicts[0] == before.verdicts[0]
    assert found.verdicts[0].startswith("Better than chance: ")
    assert files(Path("run")) == RUN | {"plots/scores.png"}
    assert samples(Path("run")) == samples(trained)
    assert (found.command, found.status, found.data["eval"]["kept"]) == ("eval", "finished", 12)
    assert found.model["adapter"] == str(trained)


@pytest.mark.parametrize("kind", ["reward", "rl"])
def test_prompts_that_were_trained_on_are_reported(
    kind: str, perl: Perl, rows: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """The run's folder is enough to find them."""
    source = rows["pairs" if kind == "reward" else "prompts"]
    words = ("eval", "-m", request.getfixturevalue(f"{kind}_run"), "-d", source, "-o", "run")
    words += () if kind == "reward" else ("--reward", "perlcli.coffee:reward", "--max-samples", 12, *BRIEF)
    assert "Warning" not in perl(*words, "--dry-run").stdout
    told = perl(*words, "--split", "train", "--dry-run").stdout
    count = 32 if kind == "reward" else 12
    assert (
        f"Warning: {count} held-out rows with a prompt that is also in the training data, so scores will look too "
        "good (rows 1, 2" in told
    )


def test_a_run_keeps_the_prompts_of_the_run_it_starts_from(sft_run: Path, rl_run: Path, rows: dict[str, Path]) -> None:
    before, after = (set(data.unpacked((run / "prompts.bin").read_bytes())) for run in (sft_run, rl_run))
    prompts = data.load(str(rows["prompts"]), "rl")
    assert before < after
    assert data.prompts(prompts).found_in(after) == prompts.numbers
    assert len(before) == 32
    assert all(row.prompt[0]["content"].encode() not in (rl_run / "prompts.bin").read_bytes() for row in prompts.rows)


def test_classifier_is_measured(perl: Perl, classifier: Path, write: Any) -> None:
    source = write(Path("rows.jsonl"), [{"prompt": "order:", "chosen": " latte", "rejected": " tea"}] * 3)
    perl("eval", "-m", classifier, "-d", source, "-o", "run")
    found = read_record(Path("run")).metrics
    (row,) = {json.dumps(sample) for sample in samples(Path("run"))}
    margin = json.loads(row)["chosen_score"] - json.loads(row)["rejected_score"]
    assert found["mean_margin"] == pytest.approx(margin)
    assert found["accuracy"] == (margin > 0)


def test_max_samples_is_noted(perl: Perl, reward_run: Path, rows: dict[str, Path]) -> None:
    result = perl("eval", "-m", reward_run, "-d", rows["pairs"], "-o", "run", "--max-samples", "5")
    assert "Evaluating on the first 5 rows that fit, of 12 (--max-samples)." in result.stdout
    assert read_record(Path("run")).metrics["rows"] == 5


def test_reward_model_is_not_judged_by_another(perl: Perl, reward_run: Path, rows: dict[str, Path]) -> None:
    result = perl("eval", "-m", reward_run, "--reward", reward_run, "-d", rows["pairs"], "-o", "run", code=2)
    assert f"Error: --model {reward_run} is a reward model; --reward only applies to policies" in result.stderr
    assert not Path("run").exists()


# A policy


def test_policy_of_rl_is_compared_with_the_policy_it_started_from(
    rl_run: Path, sft_run: Path, measured: Any, files: Callable[[Path], set[str]]
) -> None:
    found, start = measured(rl_run), measured(sft_run, output="start")
    assert set(found) == QUALITY | WRITTEN | AGAINST | KL
    assert found["anchor_mean_reward"] == start["mean_reward"]
    assert files(Path("run")) == RUN | {"plots/rewards.png"}
    assert "anchor: the policy that RL started from" in read_record(Path("run")).notes
    shown, alone = samples(Path("run")), samples(Path("start"))
    assert len(shown) == 12
    assert [row["anchor"] for row in shown] == [row["policy"] for row in alone]
    assert [row["anchor_reward"] for row in shown] == [row["policy_reward"] for row in alone]
    assert found["wins"] == sum(row["policy_reward"] > row["anchor_reward"] for row in shown) / 12
    assert found["kl_k3_per_token"] > 0


def test_policy_of_sft_is_compared_with_the_base(llama: Path, sft_run: Path, measured: Any) -> None:
    found, bare = measured(sft_run), measured(llama, output="base")
    assert "anchor: the base" in read_record(Path("run")).notes
    assert [row["anchor"] for row in samples(Path("run"))] == [row["policy"] for row in samples(Path("base"))]
    assert found["anchor_mean_reward"] == bare["mean_reward"]


def test_untrained_adapter_does_not_differ_from_its_anchor(fresh: Path, measured: Any) -> None:
    found = measured(fresh)
    assert {name: found[name] for name in KL} == dict.fromkeys(KL, 0)
    assert (found["wins"], found["share_ties"]) == (0, 1)
    assert found["mean_reward"] == found["anchor_mean_reward"]


def test_base_has_no_anchor(llama: Path, measured: Any) -> None:
    found = measured(llama)
    assert set(found) == QUALITY | WRITTEN
    assert "anchor: none (the policy is a base model)" in read_record(Path("run")).notes


def test_fully_tuned_policy_is_compared_with_the_model_it_started_from(
    perl: Perl, llama: Path, rows: dict[str, Path], measured: Any
) -> None:
    words = ("--full", "--max-steps", "1", "--learning-rate", "1e-3")
    perl("sft", "-m", llama, "-d", rows["demonstrations"] / "train.jsonl", "-o", "full", *words)
    found, start = measured(Path("full")), measured(llama, output="start")
    assert found["anchor_mean_reward"] == pytest.approx(start["mean_reward"], abs=1e-5)
    assert found["kl_k3_per_token"] > 0


def test_evaluation_only_depends_on_its_seed(rl_run: Path, measured: Any) -> None:
    first = measured(rl_run)
    assert measured(rl_run, output="again") == first
    assert measured(rl_run, "--seed", "5", output="other") != first


def test_divergence_does_not_depend_on_the_batch_size(rl_run: Path, measured: Any, monkeypatch: Any) -> None:
    """The same completions, measured four and twelve at a time."""
    written = [[40 + index, 50, 60 + index][: 1 + index % 3] for index in range(12)]
    monkeypatch.setattr(
        sampling,
        "sample",
        lambda model, render, prompts, how: [written[how.seed + index] for index in range(len(prompts))],
    )
    small = measured(rl_run, "--per-device-eval-batch-size", "4")
    large = measured(rl_run, "--per-device-eval-batch-size", "12", output="large")
    assert {name: small[name] for name in KL} == pytest.approx({name: large[name] for name in KL}, rel=1e-3)


def test_gold_counts_right_answers_to_orders(perl: Perl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded base and orders, with three of four answers right."""
    orders = [row["order"] for row in data.EMBEDDED_ROWS["rl", "test"]()[:4]]

    def answers(model: Any, render: Any, prompts: list[list[int]], how: Any) -> list[list[int]]:
        calls = [*orders[:3], orders[3][:-1]]
        return [render.tokenizer(call + "<end>", add_special_tokens=False)["input_ids"] for call in calls]

    monkeypatch.setattr(sampling, "sample", answers)
    perl("eval", "-o", "run", "--max-samples", "4")
    found = read_record(Path("run")).metrics
    assert found["gold"] == 0.75
    assert set(found) == WRITTEN | (QUALITY - {"mean_reward"})  # no reward is needed if there is a check
    assert [row["policy"] for row in samples(Path("run"))] == [*orders[:3], orders[3][:-1]]


def test_policy_without_a_reward_or_a_check_is_rejected(perl: Perl, sft_run: Path, write: Any) -> None:
    source = write(Path("rows.jsonl"), [{"prompt": [{"role": "user", "content": "a latte"}]}] * 2)
    result = perl("eval", "-m", sft_run, "-d", source, "-o", "run", code=2)
    assert "Error: --reward is missing" in result.stderr
    assert not Path("run").exists()


def test_classifier_on_another_base_scores_a_policy(
    perl: Perl, sft_run: Path, classifier: Path, rows: dict[str, Path]
) -> None:
    perl("eval", "-m", sft_run, "--reward", classifier, "-d", rows["prompts"], "-o", "run", *BRIEF)
    found = read_record(Path("run"))
    assert set(found.metrics) == QUALITY | WRITTEN | AGAINST | KL
    assert any("loaded in addition to the policy's" in note for note in found.notes)


def test_output_is_named_after_the_model(perl: Perl, reward_run: Path, rows: dict[str, Path]) -> None:
    perl("eval", "-m", reward_run, "-d", rows["pairs"])
    assert read_record(reward_run.parent / "eval-reward").status == "finished"  # next to the run
    perl("eval", "--max-samples", "1", *BRIEF)
    assert read_record(Path("runs/eval-coffee")).status == "finished"


def test_dry_run_writes_nothing(perl: Perl, rl_run: Path, reward_run: Path, rows: dict[str, Path]) -> None:
    perl("eval", "-m", rl_run, "--reward", reward_run, "-d", rows["prompts"], "-o", "run", "--dry-run")
    perl("eval", "-m", reward_run, "-d", rows["pairs"], "-o", "run", "--dry-run")
    assert list(Path().iterdir()) == []


def test_anchor_of_a_full_run_is_found_in_its_record(
    perl: Perl, llama: Path, rows: dict[str, Path], rl_run: Path
) -> None:
    assert policies.start_of(str(llama)) is None
    assert policies.start_of(str(rl_run)) is None
    perl("sft", "-d", rows["demonstrations"] / "train.jsonl", "-o", "full", *TWO_STEPS, "--full")
    assert policies.start_of("full") == str(coffee.BASE)


# Figures, on cases worked out by hand


def test_divergence_is_estimated_on_the_written_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two completions of two tokens and one; the log ratios are 1, -1 and 0.5."""
    tables = {"policy": [[-1.0, -2.0], [-0.5]], "anchor": [[-2.0, -1.0], [-1.0]]}
    monkeypatch.setattr(sampling, "log_probs", lambda model, prompts, written, heat, size: tables[model])
    settings = SimpleNamespace(
        eval=SimpleNamespace(per_device_eval_batch_size=2), sampling=SimpleNamespace(temperature=0.7)
    )
    prepared: Any = SimpleNamespace(settings=settings)
    found = evaluate.divergence(prepared, "policy", lambda: nullcontext("anchor"), [[1], [1]], [[5, 6], [7]])
    k3 = sum(math.exp(-gap) - 1 + gap for gap in (1.0, -1.0, 0.5))
    assert found == pytest.approx(
        {
            "kl_k1_per_token": 0.5 / 3,
            "kl_k1_per_sequence": 0.25,
            "kl_k3_per_token": k3 / 3,
            "kl_k3_per_sequence": k3 / 2,
        }
    )


def test_metrics_of_a_case_worked_out_by_hand() -> None:
    mine = evaluate.Samples(
        [[5, 6, 2], [5, 5], [7, 8, 9], [4, 2]], ["a", "b", "c", "d"], [1.0, 2.0, 3.0, 4.0], [True] * 3 + [False]
    )
    theirs = evaluate.Samples([[5], [6], [7], [8]], list("wxyz"), [0.0, 2.0, 4.0, 3.0], [True, False, False, False])
    prepared: Any = SimpleNamespace(renderer=SimpleNamespace(ended=lambda ids: ids[-1] == 2))
    found = evaluate.measure(prepared, mine, theirs)
    assert set(found) == QUALITY | WRITTEN | AGAINST
    wanted = {
        "prompts": 4,
        "mean_reward": 2.5,
        "anchor_mean_reward": 2.25,
        "gold": 0.75,
        "anchor_gold": 0.25,
        "wins": 0.5,
        "share_ties": 0.25,
        "mean_length": 2.5,
        "share_truncated": 0.5,
        "distinct_1": 7 / 10,
        "distinct_2": 1.0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["gold_low"] < 0.75 < found["gold_high"]
    assert found["wins_low"] < 0.5 < found["wins_high"]
    assert set(evaluate.measure(prepared, mine, None)) == QUALITY | WRITTEN
