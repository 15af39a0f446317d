"""The settings of each command on the embedded base and data."""

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {
        "max_steps": 60,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-3,
        "lora_r": 8,
        "max_length": 128,
        "set": ("lr_scheduler_type=cosine",),
    },
    "reward": {
        "max_steps": 120,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "lora_r": 8,
        "max_length": 128,
    },
    "rl": {
        "max_steps": 80,
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "lora_r": 8,
        "temperature": 1.0,
        "beta": 0.02,
        "num_generations": 4,
        "max_completion_length": 40,
        "max_length": 128,
        "set": ("lr_scheduler_type=cosine",),
    },
    "eval": {
        "temperature": 1.0,
        "max_completion_length": 40,
        "max_samples": 400,
        "per_device_eval_batch_size": 100,
        "max_length": 128,
    },
}
