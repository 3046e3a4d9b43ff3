"""How a prompt is written for a model: one place for training and for evaluation."""

from __future__ import annotations

from typing import Any


def render_prompt(tokenizer: Any, prompt: str, *, chat_template: bool = True) -> str:
    """The text that stands before a completion, in the way the tokenizer's model expects it.

    With a chat template: one user message and the opening of the assistant's turn. Without one (or
    with ``chat_template=False``): the prompt and a line break, after the start token's text if the
    tokenizer itself puts a start token in front of a text. In both cases the special tokens are
    part of the text, so tokenise it, and what is appended to it, with ``add_special_tokens=False``.
    """
    if chat_template and tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    start = tokenizer.bos_token or ""
    if start and tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        start = ""
    return f"{start}{prompt}\n"
