"""A student and a teacher small enough to train in a test, with tokenizers that differ.

Both tokenizers are trained here, on the rows below: byte-level BPE with a chat template for the
teacher, byte-level BPE of another size without one for the student. The heads have more rows than
the tokenizers have entries, as real heads do.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from sra import SharedVocabulary, SpanAligner, SpanCollator

STUDENT_ENTRIES, TEACHER_ENTRIES = 320, 420
STUDENT_ROWS, TEACHER_ROWS = 328, 448

ROWS = [
    {"prompt": "Name a river of Egypt.", "completion": "The Nile flows through Egypt."},
    {"prompt": "Count to five.", "completion": "1, 2, 3, 4, 5"},
    {"prompt": "Say hello in German.", "completion": "Guten Tag, schöne Grüße!"},
    {"prompt": "Write a loop.", "completion": "for i in range(10):\n    print(i)\n"},
    {"prompt": "你好吗？", "completion": "我很好，谢谢你。"},
    {"prompt": "Add 12 and 30.", "completion": "12 + 30 = 42, as the sum of both numbers."},
    {"prompt": "A haiku, please.", "completion": "Old pond, a frog jumps:\nthe sound of water. 🐸"},
    {"prompt": "Which way is north?", "completion": "Up on most maps, toward the pole star."},
]

CHAT = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    return [text for row in ROWS for text in row.values()] * 4


@functools.cache
def student_tokenizer() -> Any:
    tokenizer = byte_level_bpe(STUDENT_ENTRIES, ["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@functools.cache
def teacher_tokenizer() -> Any:
    tokenizer = byte_level_bpe(TEACHER_ENTRIES, ["<|pad|>", "<|begin|>", "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|begin|>"],
        chat_template=CHAT,
    )


def byte_level_bpe(entries: int, specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


@functools.cache
def sentencepiece_tokenizer() -> Any:
    """As Llama's: a space in front, ▁ for spaces, byte tokens for what has no piece."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.train_from_iterator(
        ["The Nile flows through Egypt.", "print the sum of numbers 1, 2, 3"] * 4,
        trainers.BpeTrainer(vocab_size=90, show_progress=False),
    )
    state = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *state["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in state["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


@functools.cache
def lossy_tokenizer() -> Any:
    """Knows the characters of one English sentence and silently drops every other one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["[PAD]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(["The Nile flows through Egypt."], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", pad_token="[PAD]")


def student_model(dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=STUDENT_ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def teacher_model(dtype: torch.dtype = torch.float32, *, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=TEACHER_ROWS,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,  # predictions far from uniform
        bos_token_id=None,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def collator(max_length: int = 256) -> SpanCollator:
    return SpanCollator(
        SpanAligner(student_tokenizer(), teacher_tokenizer()), max_length=max_length
    )


@functools.cache
def vocabulary() -> SharedVocabulary:
    return SharedVocabulary(
        student_tokenizer(),
        teacher_tokenizer(),
        match="raw",
        student_rows=STUDENT_ROWS,
        teacher_rows=TEACHER_ROWS,
    )


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_checkpoints(folder: Path) -> tuple[Path, Path]:
    """The student's and the teacher's checkpoint folders, as `save_pretrained` leaves them."""
    pairs = (
        (folder / "tiny-student", student_model(), student_tokenizer()),
        (folder / "tiny-teacher", teacher_model(), teacher_tokenizer()),
    )
    for path, model, tokenizer in pairs:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return pairs[0][0], pairs[1][0]
