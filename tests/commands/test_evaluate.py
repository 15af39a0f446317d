"""`perl eval`: a reward model on held-out rows; a policy against its anchor."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TWO_STEPS

from perlcli import coffee, data, settings
from perlcli.model import loading, log_probs, roles
from perlcli.model.sources import locate
from perlcli.rollouts import local
from perlcli.rollouts.how import Sampling
from perlcli.run.record import read_record
from perlcli.settings import LoraSettings, ModelSettings
from perlcli.training import policies, policy_metrics, sampling
from perlcli.training.prepare import prepare

Perl = Callable[..., Any]
RUN = {"record.json", "settings.yaml", "samples.jsonl"}
BRIEF = ("--max-completion-length", "6", "--max-length", "128")
QUALITY = {"mean_reward", "gold", "gold_low", "gold_high"}
LENGTHS = {"mean_length", "share_truncated"}
WRITTEN = {"prompts", "distinct_1", "distinct_2"} | LENGTHS
COUNTS = {"wins", "ties", "losses", "prompts_won", "prompts_tied", "prompts_lost"}
DIFFERENCES = {"net_win_rate", "mean_reward_difference", "gold_difference"}
INTERVALS = {f"{name}{end}" for name in DIFFERENCES for end in ("", "_low", "_high")}
AGAINST = COUNTS | INTERVALS | {f"anchor_{name}" for name in QUALITY | LENGTHS}
LOSS = {"answers", "loss", "perplexity"}
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_policy_of_rl_is_compared_with_the_policy_it_started_from(
    rl_run: Path, sft_run: Path, measured: Any, files: Callable[[Path], set[str]]
) -> None:
    found, start = measured(rl_run), measured(sft_run, output="start")
    assert set(found) == QUALITY | WRITTEN | AGAINST | KL
    assert found["anchor_mean_reward"] == pytest.approx(start["mean_reward"], abs=1e-5)
    assert files(Path("run")) == RUN | {"plots/rewards.png"}
    record = read_record(Path("run"))
    assert f"anchor: {sft_run}, where RL started" in record.notes
    assert [f"Better than its anchor ({sft_run}, where RL started) by " in verdict for verdict in record.verdicts] == [
        True,
        True,
    ]
    shown, alone = samples(Path("run")), samples(Path("start"))
    assert len(shown) == 12
    assert [row["anchor"] for row in shown] == [row["policy"] for row in alone]
    assert {row["anchor_model"] for row in shown} == {f"{sft_run}, where RL started"}
    assert [row["anchor_reward"] for row in shown] == [row["policy_reward"] for row in alone]
    assert found["wins"] == sum(row["policy_reward"] > row["anchor_reward"] for row in shown) / 12
    assert found["kl_k3_per_token"] > 0


def test_policy_of_sft_is_compared_with_the_base(llama: Path, sft_run: Path, measured: Any) -> None:
    found, bare = measured(sft_run), measured(llama, output="base")
    assert f"anchor: the base {llama}" in read_record(Path("run")).notes
    assert [row["anchor"] for row in samples(Path("run"))] == [row["policy"] for row in samples(Path("base"))]
    assert found["anchor_mean_reward"] == bare["mean_reward"]


def test_untrained_adapter_does_not_differ_from_its_anchor(fresh: Path, measured: Any) -> None:
    found = measured(fresh)
    assert {name: found[name] for name in KL} == dict.fromkeys(KL, 0)
    assert (found["wins"], found["ties"], found["losses"], found["prompts_tied"]) == (0, 1, 0, 12)
    (verdict,) = read_record(Path("run")).verdicts
    assert verdict.startswith("The policy wrote the same as its anchor (the base ")
    assert found["mean_reward"] == found["anchor_mean_reward"]


def test_base_has_no_anchor(llama: Path, measured: Any) -> None:
    found = measured(llama)
    assert set(found) == QUALITY | WRITTEN
    assert "anchor: none (the policy is a base model)" in read_record(Path("run")).notes


@pytest.mark.slow
def test_fully_tuned_policy_is_compared_with_the_model_it_started_from(
    perl: Perl, llama: Path, rows: dict[str, Path], measured: Any
) -> None:
    words = ("--full", "--max-steps", "1", "--learning-rate", "1e-3")
    perl("sft", "-m", llama, "-d", rows["demonstrations"] / "train.jsonl", "-o", "full", *words)
    found, start = measured(Path("full")), measured(llama, output="start")
    assert found["anchor_mean_reward"] == pytest.approx(start["mean_reward"], abs=1e-5)
    assert found["kl_k3_per_token"] > 0


@pytest.mark.slow
def test_evaluation_only_depends_on_its_seed(rl_run: Path, measured: Any) -> None:
    first = measured(rl_run)
    assert measured(rl_run, output="again") == first
    assert measured(rl_run, "--seed", "5", output="other") != first


OF_RUN = {"temperature": 1.3, "top_p": 0.9, "stop": ["a", "b"], "top_k": None, "max_completion_length": 9}


@pytest.mark.parametrize(
    ("command", "given", "sampled", "note"),
    [
        ("rl", {}, (1.3, 0.9, ("a", "b"), 9), "Completions are sampled as in {}."),
        ("sft", {}, (0.7, None, (), 128), None),
        (
            "rl",
            {"stop": ("",), "top_p": 1.0, "top_k": 5, "max_completion_length": 9},
            (1.3, 1.0, ("",), 9),
            "Completions are sampled differently from {}: --top-p 1, not 0.9; --top-k 5, not 0; "
            "--stop '', not 'a', 'b'.",
        ),
    ],
    ids=["as in the run", "the run didn't sample", "differently"],
)
def test_a_policy_is_sampled_as_its_run_sampled(
    sft_run: Path, rows: dict[str, Path], command: str, given: dict[str, Any], sampled: Any, note: str | None
) -> None:
    folder = Path("policy")
    shutil.copytree(sft_run, folder)
    record = json.loads((folder / "record.json").read_text())
    record["command"], record["settings"] = command, record["settings"] | OF_RUN
    (folder / "record.json").write_text(json.dumps(record))
    values = {"model": str(folder), "data": str(rows["prompts"]), "output": "out", **given}
    prepared = prepare(settings.build(settings.Eval, values))
    found = prepared.settings.sampling
    assert (found.temperature, found.top_p, found.stop, found.max_completion_length) == sampled
    sampling.note(prepared)
    notes = [text for text in prepared.run.record.notes if text.startswith("Completions")]
    assert notes == ([note.format(folder)] if note else [])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"top_k": 0, "min_p": 0.0, "stop": ("a",), "temperature": 2.0}, None),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, "sampled with --top-p 0.9 --repetition-penalty 1.1."),
        ({"stop": (r"\nHuman:",)}, r"--stop '\\nHuman:' has a backslash, not a newline: in bash, $'\n' is a newline."),
    ],
)
def test_sampling_from_another_distribution_is_noted(given: dict[str, Any], wanted: str | None) -> None:
    notes: list[str] = []
    kept = settings.resolve(settings.build(settings.Eval, given), {})
    sampling.note(
        SimpleNamespace(settings=kept, run=SimpleNamespace(note=notes.append), source=SimpleNamespace(record=None))
    )  # type: ignore[arg-type]
    assert len(notes) == (wanted is not None)
    assert wanted is None or notes[0].endswith(wanted)


@pytest.mark.slow
def test_divergence_does_not_depend_on_the_batch_size(rl_run: Path, measured: Any, monkeypatch: Any) -> None:
    """The same completions, measured four and twelve at a time."""
    written = [[40 + index, 50, 60 + index][: 1 + index % 3] for index in range(12)]
    monkeypatch.setattr(
        local,
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

    monkeypatch.setattr(local, "sample", answers)
    perl("eval", "-o", "run", "--max-samples", "4")
    found = read_record(Path("run")).metrics
    assert found["gold"] == 0.75
    assert set(found) == WRITTEN | (QUALITY - {"mean_reward"})  # no reward is needed if there is a check
    assert [row["policy"] for row in samples(Path("run"))] == [*orders[:3], orders[3][:-1]]


def test_without_a_reward_the_loss_kl_and_lengths_are_measured(
    perl: Perl, sft_run: Path, llama: Path, rows: dict[str, Path], write: Any
) -> None:
    """On the rows that training evaluated on the loss is the same."""
    chats = [json.loads(line) for line in (rows["demonstrations"] / "test.jsonl").read_text().splitlines()]
    source = write(Path("chats.jsonl"), [{key: row[key] for key in ("prompt", "completion")} for row in chats])
    result = perl("eval", "-m", sft_run, "-d", source, "-o", "run", *BRIEF)
    record = read_record(Path("run"))
    own = {f"loss_difference{end}" for end in ("", "_low", "_high")} | {"anchor_loss", "anchor_perplexity"}
    assert set(record.metrics) == LOSS | own | WRITTEN | KL | {f"anchor_{name}" for name in LENGTHS}
    assert record.metrics["loss"] == pytest.approx(read_record(sft_run).metrics["eval_loss"], rel=1e-4)
    assert record.metrics["perplexity"] == pytest.approx(math.exp(record.metrics["loss"]))
    difference = record.metrics["loss"] - record.metrics["anchor_loss"]
    assert record.metrics["loss_difference"] == pytest.approx(difference)
    assert record.verdicts[0].startswith(f"Predicts held-out answers better than its anchor (the base {llama}): yes;")
    assert record.verdicts[0] in result.stdout
    assert "RL" not in result.stdout
    perl("eval", "-m", llama, "-d", source, "-o", "base", *BRIEF)
    bare = read_record(Path("base")).metrics
    assert set(bare) == LOSS | WRITTEN
    assert bare["loss"] == pytest.approx(record.metrics["anchor_loss"], rel=1e-4)


def test_prompts_alone_are_measured_without_a_loss(perl: Perl, sft_run: Path, write: Any) -> None:
    source = write(Path("rows.jsonl"), [{"prompt": [{"role": "user", "content": "a latte"}]}] * 2)
    result = perl("eval", "-m", sft_run, "-d", source, "-o", "run", *BRIEF)
    assert f"No loss on held-out answers: {source} has the columns prompt" in result.stdout
    assert set(read_record(Path("run")).metrics) == WRITTEN | KL | {f"anchor_{name}" for name in LENGTHS}


def test_plain_text_is_measured_by_its_loss_only(perl: Perl, sft_run: Path, write: Any) -> None:
    source = write(Path("rows.jsonl"), [{"text": f"a latte and {count} teas"} for count in range(4)])
    result = perl("eval", "-m", sft_run, "-d", source, "-o", "run", *BRIEF)
    assert "No samples, lengths or KL: " in result.stdout
    assert set(read_record(Path("run")).metrics) > LOSS
    assert "mean_length" not in read_record(Path("run")).metrics
    assert not (Path("run") / "samples.jsonl").exists()


def test_rows_that_serve_nothing_are_refused(perl: Perl, sft_run: Path, write: Any) -> None:
    result = perl("eval", "-m", sft_run, "-d", write(Path("rows.jsonl"), [{"order": "x"}]), "-o", "run", code=2)
    assert "has the columns order" in result.stderr
    assert not Path("run").exists()


def test_rows_that_were_trained_on_can_be_left_out(perl: Perl, sft_run: Path, llama: Path, rows: Any) -> None:
    words = ("-d", rows["demonstrations"], "--skip-trained", "--dry-run")
    assert "dropped" not in perl("eval", "-m", sft_run, *words).stdout
    result = perl("eval", "-m", sft_run, *words, "--split", "train", code=2)
    assert "--skip-trained leaves no row of" in result.stderr
    assert "--skip-trained has no effect" in perl("eval", "-m", llama, *words).stdout


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


def exam(prompts: list[list[int]], *, gold: bool = False) -> Any:
    """Prompts with an order that can be checked, or without; a token 2 ends a completion."""
    extra = {"order": "add_order_item(tea)"} if gold else {}
    renderer = SimpleNamespace(ended=lambda ids: ids[-1] == 2)
    how = Sampling(0.7, 3, 0)
    asked = [(data.Prompt("x", extra), ids) for ids in prompts]
    return policy_metrics.Exam(SimpleNamespace(renderer=renderer), asked, how, 2)  # type: ignore[arg-type]


def test_divergence_is_estimated_on_the_written_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two completions of two tokens and one; the log ratios are 1, -1 and 0.5."""
    tables = {"policy": [[-1.0, -2.0], [-0.5]], "anchor": [[-2.0, -1.0], [-1.0]]}
    monkeypatch.setattr(log_probs, "log_probs", lambda model, prompts, written, heat, size: tables[model])
    opponent: Any = policy_metrics.Opponent("it", lambda: nullcontext("anchor"))  # type: ignore[arg-type]
    policy: Any = "policy"
    found = policy_metrics.divergence(exam([[1], [1]]), policy, opponent, [[5, 6], [7]])
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
    mine = policy_metrics.Samples(
        [[5, 6, 2], [5, 5], [7, 8, 9], [4, 2]], ["a", "b", "c", "d"], [1.0, 2.0, 3.0, 4.0], [True] * 3 + [False]
    )
    theirs = policy_metrics.Samples(
        [[5], [6], [7], [8]], list("wxyz"), [0.0, 2.0, 4.0, 3.0], [True, False, False, False]
    )
    case = exam([[1], [2], [3], [4]], gold=True)
    found = policy_metrics.measure(case, mine, theirs)
    assert set(found) == QUALITY | WRITTEN | AGAINST
    wanted = {
        "prompts": 4,
        "mean_reward": 2.5,
        "anchor_mean_reward": 2.25,
        "gold": 0.75,
        "anchor_gold": 0.25,
        "wins": 0.5,
        "ties": 0.25,
        "losses": 0.25,
        "prompts_won": 2,
        "net_win_rate": 0.25,
        "mean_reward_difference": 0.25,
        "gold_difference": 0.5,
        "mean_length": 2.5,
        "share_truncated": 0.5,
        "distinct_1": 7 / 10,
        "distinct_2": 1.0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["gold_low"] < 0.75 < found["gold_high"]
    assert found["net_win_rate_low"] < 0.25 < found["net_win_rate_high"]
    assert set(policy_metrics.measure(case, mine, None)) == QUALITY | WRITTEN


def samples_of(rewards: list[float], token: int = 5) -> policy_metrics.Samples:
    return policy_metrics.Samples([[token]] * len(rewards), ["x"] * len(rewards), rewards, [])


@pytest.mark.parametrize(
    ("mine", "theirs", "reply"),
    [
        ([1.0] * 20, [0.0] * 20, "yes; net win rate 100.0%"),
        ([0.0] * 20, [1.0] * 20, "no, it is worse; net win rate -100.0%"),
        ([1.0, *[0.0] * 9], [0.0] * 10, "can't say from 10 prompts; net win rate 10.0%"),  # one win and no loss
        (
            [1.0] * 90 + [-100.0] * 10,
            [0.0] * 100,
            "can't say, as it wins more prompts but its mean reward is lower; net win rate 80.0%",
        ),
    ],
)
def test_the_verdict_names_the_opponent_and_needs_an_interval(
    mine: list[float], theirs: list[float], reply: str
) -> None:
    policy, anchor = samples_of(mine), samples_of(theirs, token=6)
    case = exam([[place] for place in range(len(mine))])
    (verdict,) = policy_metrics.verdicts(
        policy_metrics.compare(case.prompts, policy, anchor), policy, anchor, "runs/sft"
    )
    assert verdict.startswith(f"Better than its anchor (runs/sft) by the reward: {reply} (95 % interval ")


def test_skipped_completions_are_in_no_pair_and_equal_ones_have_one_reward() -> None:
    policy, anchor = samples_of([1.0, math.nan, 0.5]), samples_of([0.0, 0.0, 0.52], token=6)
    anchor.written[2] = [5]
    policy_metrics.share_rewards(policy, anchor)
    assert anchor.rewards == [0.0, 0.0, 0.5]
    found = policy_metrics.compare(exam([[1], [2], [3]]).prompts, policy, anchor)
    assert (found["prompts_won"], found["prompts_tied"], found["prompts_lost"]) == (1, 1, 0)
