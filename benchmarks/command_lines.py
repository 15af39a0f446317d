"""What a user would type for each arm of one_base.py, with the same work in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RL, REWARD = "rl", "reward"  # the stages


def perl_words(spec: dict[str, Any], rewards: int = 1) -> list[str]:
    """The words after `perl`."""
    work = Path(spec["work"])
    options: dict[str, Any] = {
        "model": work / "model", "output": spec["run"], "max-steps": spec["steps"],
        "per-device-train-batch-size": spec["batch"], "gradient-accumulation-steps": 1, "learning-rate": 1e-5,
        "lora-r": spec["rank"], "lora-alpha": 2 * spec["rank"], "lora-dropout": 0.0, "seed": 0,
        "lora-target-modules": ",".join(spec["targets"]), "dtype": dtype(spec),
        "gradient-checkpointing": flag(spec["checkpointing"]),
    }  # fmt: skip
    if spec["stage"] == REWARD:
        options |= {"data": work / "pairs", "max-length": spec["length"], "eval-fraction": 0}
    else:
        options |= {
            "data": work / "prompts", "max-length": spec["prompt_tokens"] + spec["tokens"], "temperature": 0.7,
            "num-generations": spec["generations"], "beta": 0.05, "max-completion-length": spec["tokens"],
            "min-completion-length": spec["tokens"],
        }  # fmt: skip
    words = [spec["stage"], *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    words += ["--no-shared-prompts"] if spec.get("arm") == "perl-unshared" else []
    words += ["--load-in-4bit"] if spec["precision"] == "4bit" else []
    if spec["stage"] == REWARD:
        return words
    words += ["--rollouts", "merged"] if spec.get("arm") == "perl-merged" else []
    words += [word for number in range(rewards) for word in ("--reward", str(work / f"reward-{number}"))]
    return [*words, "--no-chat"]  # stock trl renders text prompts as they are, too


def stock_words(spec: dict[str, Any], arm: str) -> list[str]:
    """The words after `trl rloo` or `trl reward`."""
    work = Path(spec["work"])
    is_full, is_4bit = arm == "full", spec["precision"] == "4bit"
    precision = "float32" if arm == "stock-float32" else dtype(spec)
    options: dict[str, Any] = {
        "model_name_or_path": work / "model", "output_dir": spec["run"], "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["batch"], "gradient_accumulation_steps": 1, "learning_rate": 1e-5,
        "seed": 0, "dtype": precision, "bf16": flag(dtype(spec) == "bfloat16" or arm == "stock-float32"),
        "gradient_checkpointing": flag(spec["checkpointing"]), "use_cpu": flag(spec["device"] == "cpu"),
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": "true",
    }  # fmt: skip
    if spec["stage"] == REWARD:
        options |= {"dataset_name": work / "pairs", "max_length": spec["length"], "lora_task_type": "SEQ_CLS"}
    else:
        options |= {
            "dataset_name": work / "prompts", "temperature": 0.7, "num_generations": spec["generations"],
            "reward_model_name_or_path": work / ("model" if is_full else "reward-0"), "beta": 0.05,
            "max_completion_length": spec["tokens"],
            "generation_kwargs": json.dumps({"min_new_tokens": spec["tokens"]}),
        }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if not is_full:
        words += ["--use_peft", "--lora_r", str(spec["rank"]), "--lora_alpha", str(2 * spec["rank"])]
        words += ["--lora_dropout", "0.0", "--lora_target_modules", *spec["targets"]]
    if arm == "stock-4bit-reward":
        quantised = {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype(spec), "quant_method": "bitsandbytes",
        }  # fmt: skip
        words += ["--model_init_kwargs", json.dumps({"quantization_config": quantised})]
    elif is_4bit and arm == "stock":
        words += ["--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant"]
    return words


def dtype(spec: dict[str, Any]) -> str:
    """The dtype of what isn't quantised."""
    return "bfloat16" if spec["precision"] == "4bit" else str(spec["precision"])


def flag(value: bool) -> str:
    """A boolean as a word for the command line."""
    return "true" if value else "false"
