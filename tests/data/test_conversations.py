"""Conversations in batches, for every pair of chat templates."""

from __future__ import annotations

import functools
import itertools

import pytest
from batches import CONVERSATION, ROW, SAID, both_sides
from transformers import PreTrainedTokenizerFast

from sra import SpanAligner, SpanCollator
from sra.collator import check_coverage
from sra.data import IGNORED
from tests import real_tokenizers, tiny
from tests.chat import chat_templates
from tests.chat.chat_templates import END, KINDS

PAIRS = [*itertools.permutations([kind for kind in KINDS if kind != "gemma-strict"], 2)]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_spans_of_a_conversation_cover_what_both_sides_hold_of_the_answers(pair):
    student, teacher = map(chat_templates.tokenizer, pair)
    collator = SpanCollator(SpanAligner(student, teacher))
    batch = collator([CONVERSATION, tiny.ROWS[4]])
    left, right = both_sides(student, teacher, batch)
    trimmed = {"llama3", "gemma", "llama2", "qwen3"} & {*pair}
    shared = [SAID[0], SAID[1].lstrip(" ") if trimmed - {"qwen3"} else SAID[1]]
    # Templates that write a space before an answer have it in the answer's first token.
    differing = [(a, b) for a, b in zip(left, right, strict=True) if a != b]
    assert all(a.removeprefix("Ġ") == b.removeprefix("Ġ") for a, b in differing)
    assert len(differing) <= 2
    table = collator.table(CONVERSATION)
    raw = table.text.encode()
    assert table.text == "".join(SAID)
    joined = b"".join(raw[a:b] for a, b in table.bytes.tolist()).decode()
    assert joined == "".join(shared)
    assert table.coverage == pytest.approx(len(joined.encode()) / len(raw))
    # What is learnt: each answer as this side's template writes it, and the end of its turn.
    labels = batch["labels"][0]
    learnt = student.decode(labels[labels != IGNORED])
    own = [text.strip() if pair[0] in ("llama3", "gemma", "llama2") else text for text in SAID]
    expected = "".join(text + END[pair[0]] for text in own)
    assert learnt.replace(" ", "") == expected.replace(" ", "")
    ranges = batch["teachers"][0]["student_spans"][: len(table)].tolist()
    assert all((labels[a:b] != IGNORED).all() for a, b in ranges)


def test_a_template_that_refuses_names_row_and_side():
    chatml, strict = map(chat_templates.tokenizer, ("chatml", "gemma-strict"))
    message = "Row 1 of the batch, {}: The chat template of .*: System role not supported"
    for pair, side in (((chatml, strict), "teacher"), ((strict, chatml), "student")):
        with pytest.raises(ValueError, match=message.format(side)):
            SpanCollator(SpanAligner(*pair))([ROW, CONVERSATION])
    several = [SpanAligner(chatml, chatml), SpanAligner(chatml, strict)]
    with pytest.raises(ValueError, match=message.format("teacher 'big'")):
        SpanCollator(several, teacher_names=["small", "big"])([ROW, CONVERSATION])
    assert SpanCollator(SpanAligner(chatml, strict), chat_template=False)([CONVERSATION])


def test_a_content_that_one_side_rewrites_counts_as_uncovered():
    shouting = PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_level_bpe(310, ["</s>"]),
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
    )
    row = {"messages": [{"role": "user", "content": "q"}]}
    row["messages"].append({"role": "assistant", "content": "loud words"})
    batch = SpanCollator(SpanAligner(tiny.teacher_tokenizer(), shouting))([row])
    assert batch["coverage"].item() == 0
    assert batch["teachers"][0]["span_offsets"].tolist() == [0, 0]
    assert (batch["labels"] != IGNORED).sum() > 3


TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "Add."},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "type": "function",
                    "id": "abcdefghi",
                    "function": {"name": "sum", "arguments": {}},
                }
            ],
        },
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "The sum is 42."},
    ]
}


def test_calls_of_tools_are_learnt_but_in_no_span():
    student, teacher = map(chat_templates.tokenizer, ("chatml", "mistral"))
    batch = SpanCollator(SpanAligner(student, teacher))([TOOL_ROW])
    labels = batch["labels"][0]
    call = '<tool_call>\n{"name": "sum", "arguments": {}}\n</tool_call>'
    expected = f"{call}<|im_end|>The sum is 42.<|im_end|>"
    assert student.decode(labels[labels != IGNORED]) == expected
    left, _ = both_sides(student, teacher, batch)
    assert "".join(left).replace("Ġ", " ") == "The sum is 42."
    assert batch["coverage"].item() == 1


def test_a_row_of_calls_alone_has_no_spans():
    row = {"messages": TOOL_ROW["messages"][:2]}
    batch = tiny.collator()([row])
    assert batch["teachers"][0]["span_offsets"].tolist() == [0, 0]
    assert (batch["labels"] != IGNORED).any()
    assert check_coverage([row], tiny.collator(), 0.9) == (1, 0)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_which_turns_are_trained(turns):
    tokenizer = chat_templates.tokenizer("chatml")
    aligner = SpanAligner(tokenizer, tiny.teacher_tokenizer())
    collator = SpanCollator(aligner, train_turns=turns)
    texts = [m["content"] for m in CONVERSATION["messages"]]
    expected = texts[-1:] if turns == "last" else texts
    assert collator.table(CONVERSATION).text == "".join(expected)
    labels = collator([CONVERSATION])["labels"][0]
    learnt = tokenizer.decode(labels[labels != IGNORED])
    assert learnt == "".join(text + "<|im_end|>" for text in expected)


def test_several_pieces_are_shown_with_what_stands_between(capsys):
    pair = chat_templates.tokenizer("chatml"), chat_templates.tokenizer("plain")
    SpanCollator(SpanAligner(*pair)).table(CONVERSATION).show(width=100)
    shown = capsys.readouterr().out
    size = len("".join(SAID).encode())
    assert f"spans over {size} bytes, coverage 100.0%" in shown
    assert "<|im_end|>" in shown
    assert "<|im_start|>" in shown


@functools.cache
def dressed(name, kind):
    """A real tokenizer with one of our templates and that template's special tokens."""
    template, start, end, others = KINDS[kind]
    return PreTrainedTokenizerFast(
        tokenizer_object=real_tokenizers.load(name),
        bos_token=start,
        eos_token=end,
        additional_special_tokens=others,
        chat_template=template,
    )


@pytest.mark.models
@pytest.mark.parametrize(
    "pair",
    [
        (("gpt2", "zephyr"), ("mistral-v3", "mistral")),
        (("mistral-v3", "mistral"), ("qwen", "qwen3")),
        (("qwen", "qwen3"), ("gpt2", "zephyr")),
    ],
    ids=lambda pair: "-".join(name for name, _ in pair),
)
def test_spans_of_real_tokenizers_are_the_text_between_shared_boundaries(pair):
    """By byte ranges: each side's tokens of a span begin and end where the span does."""
    student, teacher = (dressed(*side) for side in pair)
    collator = SpanCollator(SpanAligner(student, teacher))
    for row in [CONVERSATION, *tiny.ROWS, {"text": "Two plain lines,\nnaïve 日本 👍🏽."}]:
        table = collator.table(row)
        assert table.coverage > 0.95
        raw = table.text.encode()
        for spans, tokens, text in (
            (table.student, table.student_tokens, table.student_text),
            (table.teacher, table.teacher_tokens, table.teacher_text),
        ):
            own = text.encode()
            for (first, last), (low, high) in zip(spans, table.bytes, strict=True):
                held = own[max(tokens.starts[first], 0) : tokens.ends[last - 1]]
                assert held.removeprefix(b" ") == raw[low:high].removeprefix(b" ")
    labels = collator([CONVERSATION])["labels"][0]
    learnt = student.decode(labels[labels != IGNORED]).replace(" ", "")
    assert learnt == "".join(text + END[pair[0][1]] for text in SAID).replace(" ", "")
