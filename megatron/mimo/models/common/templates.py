"""Chat templates in the manner of several models, for processors that bring none."""

from __future__ import annotations

__all__ = ["GEMMA_TEMPLATE", "INTERNVL_TEMPLATE", "LLAVA_TEMPLATE", "QWEN_TEMPLATE"]

LLAVA_TEMPLATE = """{% for message in messages %}
{%- if message['role'] != 'system' %}{{ message['role'].upper() }}: {% endif %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}
{%- endfor %}{{ ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""
QWEN_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}
{%- elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}<|audio_bos|><|AUDIO|><|audio_eos|>{% endif %}
{%- endfor %}<|im_end|>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""
INTERNVL_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}
{%- elif part['type'] == 'image' %}<IMG_CONTEXT>{{ '\\n' }}
{%- else %}<video>{{ '\\n' }}{% endif %}
{%- endfor %}<|im_end|>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""
GEMMA_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}{% else %}<start_of_image>{% endif %}
{%- endfor %}<end_of_turn>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{% endif %}"""
