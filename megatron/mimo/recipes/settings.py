"""Training settings that recipes of pretrained models share; every one gives way to a flag."""

from __future__ import annotations

__all__ = ["FINETUNING", "FINETUNING_LONG", "presets_of"]

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
FINETUNING_LONG = FINETUNING | {"lr": 1e-5, "seq_length": 4096}
"""For models of images of any size, and of clips, which take more tokens."""


def presets_of(*modalities: str) -> dict[str, dict[str, object]]:
    """The presets of a model with encoders of these modalities; encoders are not trained."""
    encoders = [f"{modality}.encoders" for modality in modalities]
    return {
        # only the projections learn: what turns rows of an encoder into the language model's
        "projector": {
            "freeze": [*encoders, "language"],
            "lr": 1e-3,
            "global_batch_size": 256,
            "train_iters": 2200,
        },
        "full": {"freeze": encoders},
        # adapters in the language model, and the projections themselves
        "lora": {
            "freeze": encoders,
            "lora": ["language"],
            "lora_rank": 128,
            "lora_alpha": 256.0,
            "lr": 2e-4,
            "module_lr": [(f"{modality}.projections", 2e-5) for modality in modalities],
        },
    }
