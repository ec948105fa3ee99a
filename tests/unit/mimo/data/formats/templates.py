"""Chat templates for tests of formats."""

from __future__ import annotations

# Writes tools, calls and their results.
TOOL_TEMPLATE = """{% if tools %}tools:
{%- for tool in tools %} {{ tool['function']['name'] }}{% endfor %}{{ '\\n' }}{% endif %}
{%- for message in messages %}{{ message['role'] }}:
{%- for call in message.get('tool_calls', []) %}{% set function = call['function'] %}
{{- ' call ' + function['name'] }} {{ function['arguments'] }}{% endfor %}
{%- for part in message['content'] %}{% if part['text'] %} {{ part['text'] }}{% endif %}
{%- endfor %}{{ '\\n' }}
{%- endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

# Forgets what was thought before the last question, as templates of models that think do.
FORGETFUL_TEMPLATE = """{%- set last = namespace(user=0) %}
{%- for message in messages %}{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}
{%- endif %}{% endfor %}
{%- for message in messages %}{{ message['role'] }}:
{%- set text = message['content'][0]['text'] %}
{%- if message['role'] == 'assistant' and loop.index0 < last.user %}
{%- set text = text.split('</think>')[-1].lstrip() %}{% endif %}
{{- ' ' + text }}</s>
{%- endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
