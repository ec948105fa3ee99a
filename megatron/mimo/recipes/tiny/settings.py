"""How all tiny twins train: the same presets as the real recipes, in seconds."""

from __future__ import annotations

__all__ = ["TINY_ARGUMENTS", "TINY_PRESETS"]

TINY_ARGUMENTS: dict[str, object] = {
    "seq_length": 96,
    "micro_batch_size": 8,
    "global_batch_size": 16,
    "train_iters": 300,
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.03,
    "weight_decay": 0.0,
    "adam_beta2": 0.98,
    "clip_grad": 1.0,
    "log_interval": 10,
    "save_interval": 1000,
    "num_workers": 0,
}
TINY_PRESETS: dict[str, dict[str, object]] = {
    "projector": {"freeze": ["language"]},
    "full": {},
    "lora": {"lora": ["language"], "lora_rank": 8},
}
