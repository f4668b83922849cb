"""The chat format as a Jinja template, for `transformers` and other servers; `chat.render_chat` says the same."""

from __future__ import annotations

__all__ = ["CHAT_TEMPLATE"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- set reasoning = message.get('reasoning') or message.get('reasoning_content') -%}
{%- if message['role'] == 'assistant' and reasoning -%}
{{- '<think>\\n' + reasoning + '\\n</think>\\n' -}}
{%- endif -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
