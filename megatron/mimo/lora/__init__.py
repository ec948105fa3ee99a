"""Low-rank adapters on Megatron's parallel linear layers, and their way to PEFT."""

from megatron.mimo.lora.merge import adapter_names, is_adapter, merge_adapter, weight_name
from megatron.mimo.lora.peft import export_adapters, peft_tensors
from megatron.mimo.lora.settings import LoraSettings, saved_settings, settings_from

__all__ = [
    "LoraSettings",
    "adapter_names",
    "export_adapters",
    "is_adapter",
    "merge_adapter",
    "peft_tensors",
    "saved_settings",
    "settings_from",
    "weight_name",
]
