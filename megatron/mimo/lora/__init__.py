"""Low-rank adapters on Megatron's parallel linear layers, and their way to PEFT."""

from megatron.mimo.lora.adapter import adapted, load_without_adapters
from megatron.mimo.lora.attach import add_adapters, merge_adapters, require_adapters
from megatron.mimo.lora.merge import adapter_names, is_adapter, merge_adapter, weight_name
from megatron.mimo.lora.peft import export_adapters, module_names, peft_tensors
from megatron.mimo.lora.settings import TARGETS, LoraSettings, saved_settings, settings_from

__all__ = [
    "TARGETS",
    "LoraSettings",
    "adapted",
    "adapter_names",
    "add_adapters",
    "export_adapters",
    "is_adapter",
    "load_without_adapters",
    "merge_adapter",
    "merge_adapters",
    "module_names",
    "peft_tensors",
    "require_adapters",
    "saved_settings",
    "settings_from",
    "weight_name",
]
