"""Chat templates in the shape of Nemotron's, as far as turns, thoughts and calls go."""

from __future__ import annotations

# Nemotron Nano 2's: words in messages switch thoughts off and on, the last message that has one of them decides.
NANO_2 = """\
{%- set ns = namespace(thinks=true) -%}
{%- for message in messages if message.role in ('user', 'system') -%}
  {%- if '/think' in message.content -%}{%- set ns.thinks = true -%}
  {%- elif '/no_think' in message.content -%}{%- set ns.thinks = false -%}{%- endif -%}
{%- endfor -%}
{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}
{{- '<SPECIAL_10>System\n' + first.replace('/think', '').replace('/no_think', '').strip() -}}
{%- if tools -%}
  {{- '\n<AVAILABLE_TOOLS>[' -}}
  {%- for tool in tools -%}{{- tool.function | tojson + (', ' if not loop.last else '') -}}{%- endfor -%}
  {{- ']</AVAILABLE_TOOLS>\nCall them so: <TOOLCALL>[{"name": "name", "arguments": "arguments"}]</TOOLCALL>' -}}
{%- endif -%}
{{- '\n\n' -}}
{%- for message in messages if message.role != 'system' -%}
  {%- if message.role == 'user' -%}
    {{- '<SPECIAL_11>User\n' + message.content.replace('/think', '').replace('/no_think', '').strip() + '\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<SPECIAL_11>User\n<TOOL_RESPONSE>[' if loop.previtem.role != 'tool' -}}
    {%- set has_more = loop.nextitem is defined and loop.nextitem.role == 'tool' -%}
    {{- message.content + (', ' if has_more else ']</TOOL_RESPONSE>\n') -}}
  {%- else -%}
    {{- '<SPECIAL_11>Assistant\n' + message.content.split('</think>')[-1].strip() -}}
    {%- if message.tool_calls -%}
      {{- '<TOOLCALL>[' -}}
      {%- for call in message.tool_calls -%}
        {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' -}}
        {{- ', ' if not loop.last -}}
      {%- endfor -%}
      {{- ']</TOOLCALL>' -}}
    {%- endif -%}
    {{- '\n<SPECIAL_12>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<SPECIAL_11>Assistant\n' + ('<think>\n\n' if ns.thinks else '<think></think>') -}}
{%- endif -%}
"""
# Nemotron 3 Nano's: a variable switches thoughts, calls are Qwen3-Coder's.
NANO_3 = """\
{%- set enable_thinking = enable_thinking if enable_thinking is defined else true -%}
{{- '<|im_start|>system\n' -}}
{%- if tools -%}
  {{- '<tools>' -}}
  {%- for tool in tools -%}{{- '<function>\n<name>' + tool.function.name + '</name>\n</function>' -}}{%- endfor -%}
  {{- '</tools>\n<tool_call>\n<function=name>\n<parameter=p>\nvalue\n</parameter>\n</function>\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' + message.content -}}
  {%- for call in message.tool_calls or [] -%}
    {{- '<tool_call>\n<function=' + call.function.name + '>\n' -}}
    {%- for name, value in call.function.arguments | items -%}
      {{- '<parameter=' + name + '>\n' + value | string + '\n</parameter>\n' -}}
    {%- endfor -%}
    {{- '</function>\n</tool_call>\n' -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n<think>' + ('\n' if enable_thinking else '</think>') -}}
{%- endif -%}
"""
