"""Chat templates of the kinds that models come with, each cut down to what it does to a row.

`tokenizer(kind)` is a tiny tokenizer of its own vocabulary with that template.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests import tiny

CHATML = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}
<tool_call>
{{ c.function | tojson }}
</tool_call>{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Trims; writes calls as bare JSON and ends a turn that calls with another token.
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{{ '<|eom_id|>' }}
{%- else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# The system prompt goes into the first user turn; the assistant is called "model"; trims.
GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(first='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.first = m.content | trim + '\n\n' %}
{%- else %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- ns.first + m.content | trim + '<end_of_turn>\n' }}{% set ns.first = '' %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# The same without system prompts.
GEMMA_STRICT = (
    "{%- if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
) + GEMMA

# A space before each answer; the system prompt goes into the last user turn; turns must alternate,
# turns that call and tools' answers aside.
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(i=0, system='') %}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n\n' %}{% endif %}
{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}
{%- for m in messages %}
{%- if m.role in ('user', 'assistant') and not m.tool_calls %}
{%- if (m.role == 'user') != (ns.i % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}{% set ns.i = ns.i + 1 %}{% endif %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (ns.system if m == last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] ' + (m.tool_calls | tojson) + eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- endif %}{% endfor %}"""

# Thoughts stay in the last turn alone, written anew; a last turn without thoughts gets empty ones.
QWEN3 = """\
{%- for m in messages %}
{%- set parts = m.content.split('</think>') if m.content else [''] %}
{%- set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}
{%- set said = parts[-1].lstrip('\n') %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\n' + thought + '\n</think>\n\n' }}
{%- endif %}
{{- said + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# No line breaks; thoughts are dropped everywhere.
DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"""

# Roles are no special tokens.
ZEPHYR = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

# A space on both sides of an answer.
LLAMA2 = """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}
{%- elif m.role == 'user' %}
{{- bos_token + '[INST] ' + (ns.system + m.content) | trim + ' [/INST]' }}{% set ns.system = '' %}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

# Kind: (template, start token, end-of-sequence token, other special tokens).
KINDS: dict[str, tuple[str | None, str | None, str, list[str]]] = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"]),
    "llama3": (
        LLAMA3,
        "<|begin|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"],
    ),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "gemma-strict": (GEMMA_STRICT, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": (
        MISTRAL,
        "<s>",
        "</s>",
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    ),
    "qwen3": (QWEN3, None, "<|im_end|>", ["<|im_start|>"]),
    "deepseek": (DEEPSEEK, "<|bos|>", "<|eos|>", ["<|User|>", "<|Assistant|>"]),
    "zephyr": (ZEPHYR, "<s>", "</s>", []),
    "llama2": (LLAMA2, "<s>", "</s>", []),
    "plain": (None, "<s>", "</s>", []),
}
# What each kind writes behind what the assistant says.
END = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gemma-strict": "<end_of_turn>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
    "deepseek": "<|eos|>",
    "zephyr": "</s>",
    "llama2": " </s>",
    "plain": "</s>",
}


@functools.cache
def tokenizer(kind: str) -> Any:
    """Byte-level BPE; each kind has another number of entries, so that kinds cut differently."""
    template, start, end, others = KINDS[kind]
    specials = [*([start] if start else []), end, *others]
    backend = tiny.byte_level_bpe(300 + 12 * list(KINDS).index(kind), specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=others,
        chat_template=template,
    )
