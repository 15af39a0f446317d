"""The defaults that depend on the stage, a recipe or an adapter; in the declaration of the option they are None."""

from __future__ import annotations

from typing import Any

from perlcli.settings.stages import ATTENTION

# Sources: the paper (arXiv 2403.10704, section 4 and appendix) for the learning rates of reward and RL, beta and
# temperature; TRL's recommendation of ten times the full-tuning rate for LoRA in SFT; TRL's defaults elsewhere.
GENERAL: dict[str, Any] = {
    "max_length": 1024,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "auto",
    "optim": "adamw_torch_fused",
    "lora_r": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ATTENTION,
    "temperature": 0.7,
    "beta": 0.05,
    "num_generations": 4,
    "max_completion_length": 128,
}
LEARNING_RATES = {"sft": (2e-4, 2e-5), "reward": (1e-4, 1e-5), "rl": (1e-5, 1e-6)}  # LoRA, full tuning
