"""Chat templates of every kind that is met, for a small tokenizer of our own."""

from __future__ import annotations

import functools
from typing import Any

from nemo_diffgemma.data import text_tokenizer

TEXT = "the quick brown fox jumps over a lazy dog while twelve wizards box; what is 7 + 5? 12, of course: thought done"

PLAIN = text_tokenizer.CHAT_TEMPLATE
MARKED = """{{ bos_token }}
{%- for m in messages %}
{{- '<|turn>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content | trim }}{{ '<turn|>' }}{%- endgeneration %}
{%- else %}{{ m.content | trim }}{{ '<turn|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn>assistant\\n' }}{% endif %}"""
# One content is never marked: a row from which nothing can be learnt
MARKED_BUT_ONE = MARKED.replace("m.role == 'assistant' %}", "m.role == 'assistant' and m.content != 'unmarked' %}")
MARKED_WITHOUT_END = MARKED.replace("{{ '<turn|>' }}{%- endgeneration %}", "{%- endgeneration %}{{ '<turn|>' }}")
# As DiffusionGemma's: generation opens a turn with an empty thought, of which the history knows nothing; thoughts are
# shown in the last turn only; tools are called and answer inside the model's turn
OPENED = """{{ bos_token }}
{%- if enable_thinking %}{{ '<|turn>system\\n<mask><turn|>\\n' }}{% endif %}
{%- set state = namespace(open=false) %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<unk>' + m.content + '<mask>' }}
{%- else %}
{%- if not state.open %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{% endif %}
{%- if m.role == 'assistant' and m.reasoning_content and loop.last %}
{{- '<mask>thought\\n' + m.reasoning_content + '<mask>' }}
{%- endif %}
{{- m.content | trim }}
{%- if m.tool_calls %}
{%- for call in m.tool_calls %}
{{- '<mask>' + call.function.name + (call.function.arguments | tojson) + '<mask>' }}
{%- endfor %}
{%- set state.open = true %}
{%- else %}{{ '<turn|>\\n' }}{%- set state.open = false %}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not state.open %}
{{- '<|turn>model\\n' }}{% if not enable_thinking %}{{ '<mask>thought\\n<mask>' }}{% endif %}
{%- endif %}"""
# The number of turns in front of everything: every turn rewrites all before it
_TURNS = "{{ messages | selectattr('role', 'eq', 'user') | list | length }}"
REWRITING = "{{ bos_token }}" + _TURNS + PLAIN.removeprefix("{{ bos_token }}")
# No special token between the turns: tokens may grow together over a boundary
BARE = """{{ bos_token }}
{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
PARTS = PLAIN.replace("message.content | trim", "message.content[0].text | trim")
MARKS_NOTHING = MARKED.replace("{%- generation %}", "{%- generation %}{% if false %}").replace(
    "{%- endgeneration %}", "{% endif %}{%- endgeneration %}"
)
DROPS = PLAIN.replace("message.content | trim", "''")


@functools.cache
def _state() -> str:
    return text_tokenizer.train([TEXT] * 3, 360)


def tokenizer(template: str = PLAIN) -> Any:
    """A tokenizer with this chat template; `<turn|>` is token 6, at which generation stops."""
    made = text_tokenizer.from_json(_state())
    made.chat_template = template
    return made
