"""Reports of `sra doctor` on real pairs, kept as text.

    python -m tests.doctor.golden --update     after a change that is meant

Real vocabularies and the configurations of real models; templates are short ones that behave as
the models' own do. Memory and time, which depend on the machine, are left out.
"""

from __future__ import annotations

import difflib
import functools
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerFast

from sra.data import load_rows
from sra.doctor import Diagnosis, diagnose
from tests import real_tokenizers

HERE = Path(__file__).parent
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}"
) + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|end_of_text|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
# Vocabulary, configuration, special tokens, chat template.
MODELS: dict[str, tuple[str, dict[str, str], str | None]] = {
    "SmolLM2-135M": (
        "smollm2",
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        DEFAULT_SYSTEM,
    ),
    "Qwen2.5-0.5B": (
        "qwen",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        DEFAULT_SYSTEM,
    ),
    "Qwen3-0.6B": ("qwen", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML),
    "Llama-3.2-1B": (
        "llama3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        LLAMA3,
    ),
    "Mistral-7B-v0.1": ("mistral-v1", {"bos_token": "<s>", "eos_token": "</s>"}, MISTRAL),
    "deepseek-llm-7b": (
        "deepseek",
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        None,
    ),
    "Gemma-3-270M": (
        "gemma3",
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        None,
    ),
    "gpt2": ("gpt2", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, None),
    "bert-base-uncased": ("bert", {"pad_token": "[PAD]", "unk_token": "[UNK]"}, None),
}
# The last vocabulary is that of another model than the configuration, a mistake that people make.
PAIRS = (
    ("SmolLM2-135M", "Qwen2.5-0.5B"),
    ("Llama-3.2-1B", "Mistral-7B-v0.1"),
    ("SmolLM2-135M", "Gemma-3-270M"),
    ("gpt2", "Qwen3-0.6B"),
    ("SmolLM2-135M", "bert-base-uncased"),
    ("SmolLM2-135M", "deepseek-llm-7b"),
)


def config(name: str) -> Any:
    fields = json.loads((HERE / "configs" / "configs.json").read_text())[name]
    return AutoConfig.for_model(**fields)


@functools.cache
def tokenizer(name: str) -> Any:
    vocabulary, special, template = MODELS[name]
    made = PreTrainedTokenizerFast(tokenizer_object=real_tokenizers.load(vocabulary), **special)
    made.chat_template = template
    return made


def diagnosis(student: str, teacher: str, **options: Any) -> Diagnosis:
    return diagnose(
        tokenizer(student),
        tokenizer(teacher),
        load_rows(HERE / "rows.jsonl"),
        student_config=config(student),
        teacher_config=config(teacher),
        student_name=student,
        teacher_name=teacher,
        resources=False,
        **options,
    )


def path(student: str, teacher: str) -> Path:
    return HERE / "golden" / f"{student}_from_{teacher}.txt"


def report(student: str, teacher: str) -> str:
    return diagnosis(student, teacher).report(width=100) + "\n"


def main() -> int:
    update = "--update" in sys.argv[1:]
    changed = 0
    for pair in PAIRS:
        new, file = report(*pair), path(*pair)
        old = file.read_text() if file.exists() else ""
        if new != old:
            changed += 1
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(file), "now")
            )
            if update:
                file.write_text(new)
    print(f"{changed} of {len(PAIRS)} reports differ" + (", written" if update and changed else ""))
    return 0 if update else int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
