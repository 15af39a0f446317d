"""What the tests share: an offline, single-threaded process, tiny models, and one run of each stage."""

import base64
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from perlcli import coffee, upstream
from perlcli.cli.app import app
from perlcli.run import plots
from perlcli.settings import ModelSettings

# The libraries read these once, when a test first imports them: one thread (spinning OpenMP threads make shared cores
# ten times slower), no network, an empty hub cache instead of the developer's, and the quiet of the command line.
HOME = tempfile.TemporaryDirectory(prefix="perlcli-tests-")
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": HOME.name, **upstream.VARIABLES}

pytest_plugins = ("imitations",)

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What most tests train with: two steps of four rows, with a learning rate whose effect two steps show.
TWO_STEPS = ("--max-steps", "2", "--per-device-train-batch-size", "4")
SHORT = (*TWO_STEPS, "--lora-r", "4", "--max-length", "128", "--learning-rate", "1e-2")

# What several roles on one base are tested with: rows of token ids, and each precision of the base.
ROWS = [[1, 40, 41, 42, 2], [1, 50], [1, 60, 61, 62, 63, 64, 65, 66, 2, 201]]
PAD = 0
PRECISIONS = {
    "float32": ModelSettings(),
    "bfloat16": ModelSettings(dtype="bfloat16"),
    "4-bit": ModelSettings(load_in_4bit=True),
    "8-bit": ModelSettings(load_in_8bit=True),
}

Row = dict[str, Any]
Perl = Callable[..., Result]


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs from all tests but those that `-m gpu` asks for: the others check what a CPU does."""
    chosen = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests on a GPU where there is none."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if wanted and not _has_gpu():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and -m gpu (make test-gpu)"))


def _has_gpu() -> bool:
    import imitations

    if os.environ.get(imitations.CHOSEN):
        return True
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in its own folder."""
    monkeypatch.chdir(tmp_path)


DRAWN = plots.png
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)  # a picture of one pixel


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[None]:
    """Pictures are put together but not drawn, which takes a third of a short run's time, except in tests marked
    `draws` or `slow`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda figure: DOT)
        yield


@pytest.fixture(autouse=True)
def draws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the pictures of such a test."""
    if request.node.get_closest_marker("draws") or request.node.get_closest_marker("slow"):
        monkeypatch.setattr(plots, "png", DRAWN)


@cache  # once: even counting what was frozen walks over all of it
def freeze() -> None:
    """Make the garbage collector ignore all objects that exist now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def loaded_once() -> None:
    """Once the libraries are loaded, make the garbage collector ignore their half a million objects.

    Otherwise every collection would walk over them, and a run asks for several.
    """
    if "perlcli.commands.rl" in sys.modules:
        freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' tokens out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def perl() -> Perl:
    """Runs a command line in this process; fails the test if it ends with another exit code than expected."""

    def run(*words: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
        return result

    return run


@pytest.fixture(scope="session")
def write() -> Callable[[Path, list[Row]], Path]:
    """Writes rows as JSONL and returns the path."""

    def rows_to(path: Path, rows: list[Row]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return rows_to


def tokenizer_of(folder: Path, *, chat: bool) -> Any:
    """A byte-level tokenizer of 400 tokens: with a chat template like SmolLM2's, without one like GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chat else ["<|endoftext|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, **options)
    rows = coffee.demonstrations(count=200)
    raw.train_from_iterator([row[key][0]["content"] for row in rows for key in ("prompt", "completion")], trainer)
    first, end = ("<|im_start|>", "<|im_end|>") if chat else ("<|endoftext|>", "<|endoftext|>")
    names = {"bos_token": first, "eos_token": end, "unk_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names, **({"pad_token": end} if chat else {}))
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a tokenizer like SmolLM2's: pad is EOS, and a newline follows the last EOS."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = tokenizer_of(folder, chat=True)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of two layers: no chat template, no pad token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tokenizer = tokenizer_of(folder, chat=False)
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """A sequence classifier with one score on GPT-2, as on the Hub: another base, another tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2ForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(3)
    model = GPT2ForSequenceClassification.from_pretrained(gpt2, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gpt2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory, write: Any) -> dict[str, Path]:
    """Coffee rows by kind, each in a folder with a train and a test file."""
    kinds: dict[str, Callable[..., list[Row]]] = {
        "demonstrations": coffee.demonstrations,
        "pairs": coffee.preferences,
        "thumbs": coffee.thumbs,
        "prompts": coffee.prompts,
    }
    top = tmp_path_factory.mktemp("rows")
    for name, kind in kinds.items():
        (top / name).mkdir()
        write(top / name / "train.jsonl", kind("train", 32))
        write(top / name / "test.jsonl", kind("test", 12))
    return {name: top / name for name in kinds}


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory: pytest.TempPathFactory, perl: Perl, llama: Path, rows: dict[str, Path]) -> Path:
    """The folder of `perl sft` on the tiny Llama."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    perl("sft", "--model", llama, "--data", rows["demonstrations"], "--output", folder, *SHORT)
    return folder


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory: pytest.TempPathFactory, perl: Perl, llama: Path, rows: dict[str, Path]) -> Path:
    """The folder of `perl reward` on the tiny Llama and pairs."""
    folder = tmp_path_factory.mktemp("runs") / "reward"
    perl("reward", "--model", llama, "--data", rows["pairs"], "--output", folder, *SHORT)
    return folder


@pytest.fixture(scope="session")
def thumbs_run(tmp_path_factory: pytest.TempPathFactory, perl: Perl, llama: Path, rows: dict[str, Path]) -> Path:
    """The folder of `perl reward` on the tiny Llama and thumbs."""
    folder = tmp_path_factory.mktemp("runs") / "thumbs"
    perl("reward", "--model", llama, "--data", rows["thumbs"], "--output", folder, *SHORT)
    return folder


@pytest.fixture(scope="session")
def rl_run(
    tmp_path_factory: pytest.TempPathFactory, perl: Perl, sft_run: Path, reward_run: Path, rows: dict[str, Path]
) -> Path:
    """The folder of `perl rl` from the SFT adapter against the reward adapter, all on one base."""
    folder = tmp_path_factory.mktemp("runs") / "rl"
    words = ("--model", sft_run, "--reward", reward_run, "--data", rows["prompts"], "--output", folder)
    lengths = ["--max-steps", "2", "--learning-rate", "1e-2", "--max-length", "128", "--max-completion-length", "12"]
    batch = ["--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2", "--num-generations", "4"]
    perl("rl", *words, *lengths, *batch)
    return folder


@pytest.fixture(scope="session")
def files() -> Callable[[Path], set[str]]:
    """The relative paths of the files in a folder, without those of checkpoints."""

    def of(folder: Path) -> set[str]:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {path for path in found if not path.startswith("checkpoints/")}

    return of


@pytest.fixture
def still_random() -> Iterator[None]:
    """Checks that the test leaves torch's random state unchanged."""
    import torch

    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture(scope="session")
def arm_of() -> Callable[..., Any]:
    """Builds an arm of a report with a run for each seed, whose every step takes `seconds`."""
    from perlcli.arms import FULL
    from perlcli.comparison.results import ArmResult, RunFigures

    def run(name: str, seed: int, seconds: float, metrics: Row, given: Row) -> RunFigures:
        return RunFigures(
            **{
                "folder": f"{name}-{seed}",
                "command": f"perl reward --seed {seed}",
                "status": "finished",
                "seed": seed,
                "steps": 4,
                "trainable_parameters": 100,
                "total_parameters": 10_000,
                "memory_mb": 500.0,
                "step_seconds": [seconds, seconds * 2],
                "step_cpu_seconds": [seconds, seconds * 2],
                "step_tokens": [50, 50],
                "weights_bytes": 4000,
                "optimizer_bytes": 8000,
                "metrics": metrics,
                **given,
            }
        )

    def arm(
        name: str = "lora r=16",
        seconds: float = 1.0,
        seeds: tuple[int, ...] = (0,),
        metrics: Row | None = None,
        of_arm: Row | None = None,
        **of_run: Any,
    ) -> ArmResult:
        full = name == FULL
        values: Row = {
            "model": "org/base",
            "kind": FULL if full else "lora",
            "precision": "float32",
            "rank": None if full else 16,
            "learning_rate": 1e-5 if full else 1e-4,
            "is_baseline": full,
        } | (of_arm or {})
        return ArmResult(name=name, runs=[run(name, seed, seconds, metrics or {}, of_run) for seed in seeds], **values)

    return arm


@pytest.fixture(scope="session")
def render(llama: Path) -> Any:
    """The renderer of the tiny Llama."""
    from perlcli.model import tokenizers
    from perlcli.model.sources import locate

    source = locate(str(llama))
    return tokenizers.renderer(source, tokenizers.load_tokenizer(source))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Writes a module of the user's into the working directory, and gives its name."""
    name = "user_" + "".join(letter for letter in request.node.name if letter.isalnum())[:60]
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(text: str) -> str:
        Path(f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return name

    return write
