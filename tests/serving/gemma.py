"""A byte tokenizer with Gemma's markers, and a chat template that writes conversations as the released one does."""

from __future__ import annotations

import functools
from typing import Any

from tests.serving import cases

# ids 1, 7 and 9 end an answer (cases.EOS): <eos>, <|tool_response> and <turn|>, as in the released configuration
SPECIAL = ("<pad>", "<eos>", "<bos>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
           '<|"|>', "<turn|>", "<|turn>", "<|think|>", "<|tool>", "<tool|>", "<tool_response|>")  # fmt: skip

TEMPLATE = """
{%- macro written(value) -%}
    {%- if value is string -%}{{ '<|"|>' + value + '<|"|>' }}
    {%- elif value is boolean -%}{{ 'true' if value else 'false' }}
    {%- elif value is mapping -%}{{ '{' + members(value) + '}' }}
    {%- elif value is sequence -%}[{% for item in value %}{{ ',' if not loop.first }}{{ written(item) }}{% endfor %}]
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- macro members(mapping) -%}
    {%- for key, value in mapping | dictsort %}{{ ',' if not loop.first }}{{ key }}:{{ written(value) }}{% endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if system or tools or enable_thinking -%}
    {{- '<|turn>system\\n' -}}{%- if enable_thinking -%}{{ '<|think|>\\n' }}{%- endif -%}{{- system | trim -}}
    {%- for tool in tools or [] -%}{{ '<|tool>declaration:' + tool.function.name + '{' -}}
    {{- members({'description': tool.function.description or '', 'parameters': tool.function.parameters or {}}) -}}
    {{- '}<tool|>' -}}{%- endfor -%}{{- '<turn|>\\n' -}}
{%- endif -%}
{%- set state = namespace(open=false, names={}) -%}
{%- for message in messages if message.role != 'system' -%}
    {%- if message.role == 'tool' -%}
        {{- '<|tool_response>response:' + state.names[message.tool_call_id] + '{value:' -}}
        {{- written(message.content) + '}<tool_response|>' -}}
    {%- else -%}
        {%- if not state.open -%}
            {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
        {%- endif -%}
        {%- if message.reasoning_content and message.tool_calls -%}
            {{- '<|channel>thought\\n' + message.reasoning_content + '\\n<channel|>' -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set state.names = dict(state.names, **{call.id: call.function.name}) -%}
            {{- '<|tool_call>call:' + call.function.name + '{' + members(call.function.arguments) + '}<tool_call|>' -}}
        {%- endfor -%}
        {{- message.content | trim -}}
        {%- set state.open = message.tool_calls | default([], true) | length > 0 -%}
        {%- if not state.open -%}{{ '<turn|>\\n' }}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not state.open -%}
    {{- '<|turn>model\\n' -}}{%- if not enable_thinking -%}{{ '<|channel>thought\\n<channel|>' }}{%- endif -%}
{%- endif -%}"""


@functools.cache
def tokenizer() -> Any:
    """Bytes as tokens, behind the special ones, and words that only answers have."""
    from tests.serving import served

    return served.byte_tokenizer(SPECIAL, TEMPLATE)


def ids(text: str) -> list[int]:
    """A byte is a token; markers are theirs."""
    return tokenizer()(text, add_special_tokens=False).input_ids


assert [SPECIAL[id] for id in cases.EOS] == ["<eos>", "<|tool_response>", "<turn|>"]
