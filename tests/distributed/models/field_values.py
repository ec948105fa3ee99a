"""Other values of every field of every configuration that a family takes, class by class."""

from __future__ import annotations

from typing import Any

__all__ = ["OTHERS"]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
AXES = {"mrope_section": [2, 3, 3]}
BASE = {"rope_type": "default", "rope_theta": 1234.56}  # no whole number
TEXT: dict[str, list[Any]] = {
    "vocab_size": [400],
    "hidden_size": [128],
    "intermediate_size": [80],
    "num_hidden_layers": [1],
    "num_attention_heads": [8],
    "num_key_value_heads": [4],
    "hidden_act": ["gelu", "swish"],
    "rms_norm_eps": [0.1],
    "rope_parameters": [
        BASE,
        {**BASE, **AXES},  # which only Qwen2.5-VL reads
        {**LLAMA3, "partial_rotary_factor": 0.5},
        {**LLAMA3, "rope_type": "dynamic"},
        {**LLAMA3, "rope_type": "yarn", "original_max_position_embeddings": 16},
        {"rope_type": "longrope", "rope_theta": 100.0, "long_factor": [1.0], "short_factor": [2.0]},
        {**LLAMA3, "low_freq_factor": 2.0},
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    ],
    "pad_token_id": [3],
    "max_position_embeddings": [300],
    "attention_dropout": [0.5],
    "attention_bias": [True],
    "mlp_bias": [True],
    "head_dim": [32],
    "tie_word_embeddings": [True],
    "sliding_window": [4, 256],
    "use_sliding_window": [True],
    "max_window_layers": [1],
    "layer_types": [["full_attention", "sliding_attention"]],
    "bos_token_id": [9],
    "eos_token_id": [9],
    "pretraining_tp": [2],
}
GEMMA3: dict[str, list[Any]] = {
    "_sliding_window_pattern": [2],
    "hidden_activation": ["silu"],
    "query_pre_attn_scalar": [100],
    "final_logit_softcapping": [5.0],
    "attn_logit_softcapping": [5.0],
    "use_bidirectional_attention": [True],
    "tie_word_embeddings": [False],
    "layer_types": [["full_attention"] * 4, ["sliding_attention", "full_attention"] * 2],
    "rope_parameters": [
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 123.5, "factor": 8.0},
            "sliding_attention": {"rope_type": "yarn", "rope_theta": 77.5, "factor": 8.0},
        }
    ],
}
EXPERTS: dict[str, list[Any]] = {
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[0]],
    "moe_intermediate_size": [24],
    "num_local_experts": [3, 0],
    "num_experts_per_tok": [1, 3],
    "norm_topk_prob": [True],
    "router_aux_loss_coef": [0.5],
    "output_router_logits": [],  # of the loss, not of logits
}
IMAGES: dict[str, list[Any]] = {
    "hidden_size": [48],
    "intermediate_size": [40],
    "num_hidden_layers": [4],
    "num_attention_heads": [2],
    "num_channels": [1],
    "image_size": [32],
    "patch_size": [12],
    "hidden_act": ["gelu", "gelu_fast"],
    "layer_norm_eps": [0.1],
    "attention_dropout": [0.5],
    "projection_dim": [7],
    "initializer_factor": [2.0],
    "vision_use_head": [False],
}
AUDIO: dict[str, list[Any]] = {
    "num_mel_bins": [8],
    "encoder_layers": [1],
    "encoder_attention_heads": [2],
    "encoder_ffn_dim": [40],
    "d_model": [48],
    "activation_function": ["relu"],
    "attention_dropout": [0.5],
    "max_source_positions": [20],
    "scale_embedding": [True],
    "encoder_layerdrop": [0.1],
    "dropout": [0.1],
    "activation_dropout": [0.1],
    "decoder_layers": [1],
    "decoder_attention_heads": [2],
    "decoder_ffn_dim": [16],
    "apply_spec_augment": [True],
    "use_weighted_layer_sum": [True],
    "tie_word_embeddings": [False],
}
LLAVA: dict[str, list[Any]] = {
    "image_token_index": [9],
    "projector_hidden_act": ["relu", "tanh"],
    "vision_feature_select_strategy": ["full"],
    "vision_feature_layer": [-1, 1, [1, -2], [0, 2]],
    "multimodal_projector_bias": [False],
    "tie_word_embeddings": [True],
    "image_seq_length": [77],
    "image_grid_pinpoints": [[[24, 24], [48, 24]], [[24, 60]]],
    "audio_token_index": [9],
}
VISUALS: dict[str, list[Any]] = {
    "image_token_id": [9],
    "video_token_id": [9],
    "vision_start_token_id": [9],
    "vision_end_token_id": [9],
    "tie_word_embeddings": [True],
}
TURNS: list[Any] = [
    {**BASE, "mrope_section": [6, 3, 3]},
    {**BASE, "mrope_section": [2, 5, 5], "mrope_interleaved": False},
    BASE,  # transformers takes a section of 64 frequencies
    {**LLAMA3, "mrope_section": [4, 4, 4]},
]
QWEN3_5: dict[str, list[Any]] = {
    "head_dim": [32],
    "num_hidden_layers": [5],
    "layer_types": [["full_attention"] * 4, ["chunked_attention"] * 4],
    "linear_conv_kernel_dim": [2, 5],
    "linear_key_head_dim": [6],
    "linear_value_head_dim": [20],
    "linear_num_key_heads": [2, 3],
    "linear_num_value_heads": [4],
    "rope_parameters": [
        {**BASE, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 1]},
        {**BASE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
        {**BASE, "mrope_section": [6, 3, 3]},
        {**BASE, "partial_rotary_factor": 0.4, "mrope_section": [2, 1, 1]},
        {**LLAMA3, "partial_rotary_factor": 0.5, "mrope_section": [2, 2, 2]},
    ],
    "shared_expert_intermediate_size": [24],
    "num_experts": [3],
}
FRAMES: dict[str, list[Any]] = {
    "depth": [3],
    "hidden_size": [48],
    "hidden_act": ["gelu"],
    "intermediate_size": [40],
    "num_heads": [2],
    "in_channels": [1],
    "patch_size": [8],
    "spatial_merge_size": [1],
    "temporal_patch_size": [1],
    "out_hidden_size": [32],
    "num_position_embeddings": [36, 30],
    "deepstack_visual_indexes": [[1], [], [1, 3], [2, 0]],
    "rope_parameters": [{"rope_type": "axial", "rope_theta": 55.5}],
}
OTHERS: dict[str, dict[str, list[Any]]] = {
    **dict.fromkeys(("llava", "llava_next", "llava_avlm", "qwen2_audio"), LLAVA),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"), TEXT | EXPERTS),
    "gemma3_text": TEXT | GEMMA3,
    "qwen2_5_vl_text": {
        **TEXT,
        "rope_parameters": [
            {**BASE, **AXES},
            BASE,  # transformers takes a section of 60 frequencies
            {**BASE, "mrope_section": [3, 3, 3]},
            {**LLAMA3, **AXES},
        ],
    },
    "qwen3_vl_text": TEXT | {"rope_parameters": TURNS},
    "qwen3_vl_moe_text": TEXT | EXPERTS | {"rope_parameters": TURNS},
    "qwen3_5_text": TEXT | QWEN3_5,
    "qwen3_5_moe_text": TEXT | EXPERTS | QWEN3_5,
    **dict.fromkeys(
        ("qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_5_vision", "qwen3_5_moe_vision"), FRAMES
    ),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), IMAGES),
    **dict.fromkeys(("whisper", "qwen2_audio_encoder"), AUDIO),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), VISUALS),
    "gemma3": {
        "image_token_index": [9],
        "boi_token_index": [9],
        "eoi_token_index": [9],
        "mm_tokens_per_image": [1, 16, 9],
        "tie_word_embeddings": [True],
    },
    "internvl": {
        "image_token_id": [9],
        "image_seq_length": [77],
        "downsample_ratio": [0.25, 1.0, 0.3],
        "projector_hidden_act": ["relu", "tanh"],
        "vision_feature_layer": [-2, 1, 3],
        "vision_feature_select_strategy": ["full"],
        "tie_word_embeddings": [True],
    },
    "internvl_vision": {
        **IMAGES,
        "image_size": [[48, 48], [40, 40], [32, 64]],
        "patch_size": [[4, 4], [8, 4]],
        "attention_bias": [False],
        "use_qk_norm": [True],
        "norm_type": ["rms_norm", "batch_norm"],
        "use_mask_token": [True],
        "use_mean_pooling": [False],
        "layer_scale_init_value": [0.3],
        "hidden_dropout_prob": [0.1],
        "projection_dropout": [0.1],
        "use_absolute_position_embeddings": [False],
    },
    "qwen2_5_vl_vision": {
        "depth": [2],
        "hidden_size": [48],
        "hidden_act": ["gelu"],
        "intermediate_size": [40],
        "num_heads": [2],
        "in_channels": [1],
        "patch_size": [8],
        "spatial_merge_size": [1],
        "temporal_patch_size": [1],
        "tokens_per_second": [7],
        "window_size": [32, 20],
        "out_hidden_size": [32],
        "fullatt_block_indexes": [[0], [-1]],
        "rope_parameters": [{"rope_type": "axial", "rope_theta": 55.5}],
    },
}
