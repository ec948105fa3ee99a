"""Training settings that recipes of pretrained models share; every one gives way to a flag."""

from __future__ import annotations

__all__ = ["AUDIO_STAGES", "FINETUNING", "VISION_STAGES"]

FINETUNING: dict[str, object] = {
    "seq_length": 2048,
    "micro_batch_size": 1,
    "global_batch_size": 128,
    "train_iters": 5000,
    "lr": 2e-5,
    "min_lr": 0.0,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.03,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "clip_grad": 1.0,
    "log_interval": 10,
    "use_distributed_optimizer": True,
    "num_workers": 4,
}


def _stages(modality: str) -> dict[str, dict[str, object]]:
    encoders = f"{modality}.encoders"
    return {
        # only the projection learns: what turns rows of the encoder into the language model's
        "projector": {
            "freeze": [encoders, "language"],
            "lr": 1e-3,
            "global_batch_size": 256,
            "train_iters": 2200,
        },
        "full": {"freeze": [encoders]},
        # adapters in the language model, and the projection itself
        "lora": {
            "freeze": [encoders],
            "lora": ["language"],
            "lora_rank": 128,
            "lora_alpha": 256.0,
            "lr": 2e-4,
            "module_lr": [(f"{modality}.projections", 2e-5)],
        },
    }


VISION_STAGES = _stages("images")
AUDIO_STAGES = _stages("audio")
