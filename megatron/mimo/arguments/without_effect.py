"""The flags of megatron-core 0.19 that have no effect in this project's training layer, and why.

They were found by their names: neither Megatron's training loop nor this project reads them. A
recipe brings the model, its data and its tokenizer, so that Megatron's flags for these do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["GROUPS", "HARMLESS", "NAMES"]

_DATA = "recipes bring their own data, in micro-batches that are ready"
_LENGTH = "sequences have the length of --seq-length"
_FULL = "an evaluation reads --eval-iters batches"
_TOKENIZER = "the tokenizer is the recipe's, from the folder of --hf or --load"
_FIM = "fill-in-the-middle belongs to Megatron's own text data"
_MODEL = "a recipe builds its model itself"
_GENERATION = "generation is this project's own (examples/mimo/generate.py)"
_HYBRID = "models with Mamba layers are not supported"

# Titles of groups of the parser: nothing in them is read.
GROUPS: Mapping[str, str] = {
    "biencoder": "retrieval models are not supported",
    "vision": "encoders of images belong to the recipe's model",
    "rl": "reinforcement learning is not supported",
    "Logits Distillation": "distillation is not supported",
    "sft": "recipes of conversations do this by themselves",
}

NAMES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("split", "data_args_path", "per_split_data_args_path", "per_dataset_sequences_path"),
            *("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap", "data_cache_path"),
            *("mmap_bin_files", "mock_data", "sample_rate", "mask_prob", "short_seq_prob"),
            *("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"),
            *("eod_mask_loss", "create_attention_mask_in_dataloader", "allow_ambiguous_pad_tokens"),
            *("num_dataset_builder_threads", "object_storage_cache_path"),
            *("mid_level_dataset_surplus", "phase_transition_iterations"),
        ),
        _DATA,
    ),
    **dict.fromkeys(("encoder_seq_length", "decoder_seq_length"), _LENGTH),
    **dict.fromkeys(("full_validation", "multiple_validation_sets", "validation_set_names"), _FULL),
    **dict.fromkeys(
        (
            *("fim_data", "fim_rate", "fim_spm_rate", "fim_split_sample", "fim_fragment_rate"),
            *("fim_no_prefix", "fim_prefix_token", "fim_middle_token", "fim_suffix_token"),
            *("fim_pad_token", "fim_eod_token"),
        ),
        _FIM,
    ),
    **dict.fromkeys(
        (
            *("vocab_file", "merge_file", "vocab_extra_ids", "tokenizer_type", "tokenizer_model"),
            *("metadata_path", "special_tokens", "tiktoken_pattern", "tiktoken_num_special_tokens"),
            *("tokenizer_sentencepiece_legacy", "tokenizer_sentencepiece_ignore_extra_whitespaces"),
            *("tokenizer_hf_no_use_fast", "tokenizer_hf_no_include_special_tokens"),
            *("trust_remote_code", "null_tokenizer_eod_id", "null_tokenizer_pad_id"),
            *("chat_template", "use_tokenizer_model_from_checkpoint_args"),
        ),
        _TOKENIZER,
    ),
    **dict.fromkeys(
        (
            *("spec", "encoder_num_layers", "decoder_num_layers", "relative_attention_num_buckets"),
            *("relative_attention_max_distance", "openai_gelu", "onnx_safe", "bert_binary_head"),
            *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
        ),
        _MODEL,
    ),
    **dict.fromkeys(
        (
            *("is_hybrid_model", "hybrid_layer_pattern", "hybrid_override_pattern"),
            *("mtp_hybrid_override_pattern", "mamba_state_dim", "mamba_head_dim"),
            *("mamba_num_groups", "mamba_num_heads", "use_mamba_mem_eff_path"),
            *("mamba_training_ssm_states_dtype", "mamba_inference_conv_states_dtype"),
            "mamba_inference_ssm_states_dtype",
        ),
        _HYBRID,
    ),
    **dict.fromkeys(
        (
            *("inference_batch_times_seqlen_threshold", "max_tokens_to_oom", "inference_shards"),
            *("output_bert_embeddings", "bert_embedder_type", "use_legacy_static_engine"),
            *("inference_max_requests", "inference_max_seq_length", "inference_dynamic_batching"),
            *("decode_only_cuda_graphs", "enable_chunked_prefill", "num_speculative_tokens"),
            *("inference_coordinator_port", "inference_wandb_logging"),
        ),
        _GENERATION,
    ),
    "yaml_cfg": "use --config, which takes every flag",
    "freeze_all_layers": "parts are frozen by name: --freeze language images ...",
    "rampup_batch_size": "Megatron reads it no longer; --step-batch-size-schedule does this",
    "dist_ckpt_format_deprecated": "Megatron reads it no longer; --ckpt-format does this",
    "checkpoint_activations": "Megatron reads it no longer; --recompute-activations does this",
    "exit_signal_handler_for_dataloader": "processes that read data leave signals to their rank",
    "use_checkpoint_args": "sizes follow from the recipe, and are compared with the checkpoint's",
}

# Read over as well, but what they ask for is what is done.
HARMLESS: Mapping[str, str] = {
    "deprecated_use_mcore_models": "all models are of megatron-core",
    "use_dist_ckpt_deprecated": "distributed checkpoints are the default (--ckpt-format)",
    "ckpt_fully_parallel_save_deprecated": "this is the default",
    "disable_msc_deprecated": "this is the default",
}
