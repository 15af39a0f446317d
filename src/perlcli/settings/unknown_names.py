"""What an unknown name of an option may mean: names that people try, names of other commands, slips of the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import SequenceMatcher

from perlcli.settings import trl_names
from perlcli.settings.declaring import dashed
from perlcli.settings.naming import PASSED

# Names that people try, and what they mean here, in the order of preference.
MEANT = {
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "bs": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "train_batch_size": ("per_device_train_batch_size",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
    "lr": ("learning_rate",),
    "lr_scheduler": ("lr_scheduler_type",),
    "scheduler": ("lr_scheduler_type",),
    "warmup": ("warmup_steps",),
    "clip_grad": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm",),
    "optimizer": ("optim",),
    "optimiser": ("optim",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "rank": ("lora_r",),
    "r": ("lora_r",),
    "lora_rank": ("lora_r",),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "lora_target": ("lora_target_modules",),
    "target_modules": ("lora_target_modules",),
    "model_name": ("model", "adapter"),
    "model_id": ("model", "adapter"),
    "model_path": ("model", "adapter"),
    "base_model": ("model",),
    "adapter_name_or_path": ("model", "adapter"),
    "dataset": ("data", "file"),
    "dataset_path": ("data", "file"),
    "data_path": ("data", "file"),
    "train_data": ("data",),
    "train_file": ("data",),
    "train_dataset": ("data",),
    "eval_dataset": ("eval_data", "data"),
    "eval_file": ("eval_data", "data"),
    "validation_file": ("eval_data",),
    "val_data": ("eval_data", "data"),
    "out": ("output",),
    "out_dir": ("output",),
    "output_folder": ("output",),
    "output_path": ("output",),
    "save_dir": ("output",),
    "seq_len": ("max_length",),
    "seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "context_length": ("max_length",),
    "cutoff_len": ("max_length",),
    "max_tokens": ("max_completion_length",),
    "max_new_tokens": ("max_completion_length",),
    "num_samples": ("num_generations",),
    "num_return_sequences": ("num_generations",),
    "kl": ("beta",),
    "kl_weight": ("beta",),
    "ref_model": ("anchor",),
    "reference_model": ("anchor",),
    "reward_model": ("reward",),
    "reward_fn": ("reward",),
    "reward_func": ("reward",),
    "reward_function": ("reward",),
    "precision": ("dtype",),
    "quantization": ("load_in_4bit",),
    "qlora": ("load_in_4bit",),
    "4bit": ("load_in_4bit",),
    "8bit": ("load_in_8bit",),
    "random_seed": ("seed",),
    "resume_from": ("resume",),
    "checkpoint": ("resume",),
    "logger": ("report_to",),
    "force": ("overwrite",),
}
# Names that people try for what is no option.
ADVICE = dict.fromkeys(("gpu", "gpus", "num_gpus", "n_gpu", "devices", "device"), trl_names.OUTSIDE)


def typed(name: str) -> str:
    """A name as it is typed on the command line."""
    return f"--{dashed(name)}"


def meaning(name: str, command: str, options: Iterable[str], shown: Callable[[str], str] = str) -> str:
    """A sentence with what an unknown name may mean: an option with the same meaning, or one that differs by a slip of
    the keys; empty if there is none. `options` are the command's, `shown` writes a name as the user would."""
    known, name = list(options), name.replace("-", "_").strip("_")
    if name in ADVICE:
        return f"{ADVICE[name]}."
    passed = trl_names.FIELDS.get(command, frozenset()) if PASSED in known else frozenset()
    slips = sorted(
        (each for each in (*known, *passed) if is_slip(name, each)), key=lambda each: (-_likeness(name, each), each)
    )
    found = [meant for meant in MEANT.get(name, ()) if meant in known or meant in passed] or slips
    if found:
        return f"Did you mean {shown(found[0])}?"
    other = next((other for other, fields in trl_names.FIELDS.items() if name in fields), None)
    return f"perl {other} has this option." if other else ""


def is_slip(name: str, known: str) -> bool:
    """Whether a name is another one with a slip of the keys. Its words must be the same: `max-lenght` is `max-length`,
    but `top-k` is not `top-p`."""
    if [letter for letter in name if letter.isdigit()] != [letter for letter in known if letter.isdigit()]:
        return False
    if name.replace("_", "") == known.replace("_", "") or _likeness(name, known) >= 0.9:
        return True
    words, others = name.split("_"), known.split("_")
    return len(words) == len(others) and all(map(_is_same_word, words, others))


def _is_same_word(word: str, other: str) -> bool:
    return word == other or (max(len(word), len(other)) > 3 and _likeness(word, other) >= 0.75)


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
