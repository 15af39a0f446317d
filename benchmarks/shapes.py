"""Models in the shape of real ones, with random weights, and rows of one length in tokens, to measure costs with.

    python benchmarks/shapes.py llama-3.2-1b FOLDER
    perl compare-full reward --model FOLDER/model --data FOLDER/pairs.jsonl

Writes FOLDER/model (weights and a tokenizer with one token per word), pairs.jsonl for `perl reward`, chats.jsonl for
`perl sft` and prompts.jsonl for `perl rl`. Such a model has learned nothing; only its cost is real.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LLAMA = {
    "architecture": "llama", "vocab_size": 128256, "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip
QWEN3 = {
    "architecture": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "head_dim": 128, "num_key_value_heads": 8,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False,
        "head_dim": 128,
    },
    "llama-3.2-3b": LLAMA | {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "tie_word_embeddings": True,
        "num_attention_heads": 24, "head_dim": 128,
    },
    "qwen3-14b": QWEN3 | {
        "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40,
    },
    "qwen3-32b": QWEN3 | {
        "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
    },
    "qwen2.5-1.5b": {
        "architecture": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "tiny": {
        "architecture": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
}  # fmt: skip
PAIRS, CHATS, PROMPTS = "pairs.jsonl", "chats.jsonl", "prompts.jsonl"


def make_model(name: str, folder: Path, dtype: str, device: str = "cpu") -> None:
    """Writes a model of this shape with random weights, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = dict(CONFIGS[name])
    tokenizer = make_tokenizer(shape["vocab_size"])
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(shape.pop("architecture"), **shape, **ids)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def make_tokenizer(size: int) -> Any:
    """A tokenizer with one token per word, so that text keeps its length when it is decoded and encoded again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<eos>", "<pad>", "<unk>"]
    words = special + [f"w{number}" for number in range(size - len(special))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def words_of(tokenizer: Any, dice: random.Random) -> list[str]:
    """Words of the vocabulary that are one token each after a space."""
    ids = dice.sample(range(len(tokenizer)), min(5000, len(tokenizer)))
    words = [word for token in ids if (word := tokenizer.decode([token]).strip()).isalnum() and word.isascii()]
    return [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1]


class Texts:
    """Texts of any length in tokens, for a model's tokenizer."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.dice = random.Random(0)
        self.words = words_of(self.tokenizer, self.dice)

    def __call__(self, tokens: int) -> str:
        """A text of this many tokens, not counting special ones such as BOS."""
        text = "".join(f" {self.dice.choice(self.words)}" for _ in range(tokens))
        assert len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) == tokens
        return text


def make_rows(model: Path, folder: Path, length: int, completion: int, count: int) -> None:
    """Writes pairs, demonstrations and prompts. Every row has `length` tokens, including the completion's EOS."""
    texts = Texts(model)
    start = len(texts.tokenizer("")["input_ids"])  # BOS, if the tokenizer adds one
    prompt, answer = length - completion - start, completion - 1
    if prompt < 1 or answer < 1:
        raise SystemExit(f"--length {length} leaves no room for a prompt and --completion {completion}")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = ({"prompt": texts(prompt), "chosen": texts(answer), "rejected": texts(answer)} for _ in range(count))
    write(folder / PAIRS, pairs)
    write(folder / CHATS, ({"prompt": texts(prompt), "completion": texts(answer)} for _ in range(count)))
    write(folder / PROMPTS, ({"prompt": texts(prompt)} for _ in range(count)))


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes rows as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shape", choices=CONFIGS, help="the real model whose shape to use")
    add("folder", type=Path, help="output folder for the model and the rows")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="dtype of the stored weights")
    add("--length", type=int, default=1024, help="tokens per row, prompt and completion together")
    add("--completion", type=int, default=128, help="tokens per completion, including EOS")
    add("--rows", type=int, default=512, help="rows per file")
    add("--device", default="cpu", help="device that creates the weights; cuda is faster for large models")
    return parser.parse_args(words)


def main() -> None:
    """Writes a model and rows for it."""
    given = parse()
    make_model(given.shape, given.folder / "model", given.dtype, given.device)
    make_rows(given.folder / "model", given.folder, given.length, given.completion, given.rows)
    print(f"Wrote {given.folder}/model, and {given.rows} rows each to {PAIRS}, {CHATS} and {PROMPTS} in that folder.")


if __name__ == "__main__":
    main()
