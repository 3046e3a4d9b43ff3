"""Where a row's words stand in what each chat template makes of it."""

from __future__ import annotations

import itertools
import json

import pytest
from chat_templates import END, KINDS, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import sra.chat
from sra.chat import render, render_prompt
from tests import tiny

TALKING = [kind for kind in KINDS if kind != "gemma-strict"]
SYSTEM = {"role": "system", "content": "Be brief. assistant"}


def turns(*contents, system=True):
    """A conversation: user and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    talk = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return {"messages": [SYSTEM, *talk] if system else talk}


# Words that also stand in templates, in prompts, in each other, or twice.
TALKS = {
    "one": ("Name a river.", "The Nile."),
    "several": ("Count.", "1, 2", "On.", "3, 4", "And?", "5"),
    "role names": ("user", "assistant", "model\n", "user", "assistant", "system"),
    "the same again": ("ok", "ok", "ok", "ok", "k", "o"),
    "parts of templates": ("INST", "im_end", "</s", "<|", "[/INST", "content"),
    "scripts": ("你好吗？", "我很好 🐸", "e\u0301", "schöne Grüße"),
    "lines": ("a\n\nb", "for i in x:\n    print(i)\n\n# end", "more", "\\n {{ m }} {% if %}"),
}


def spoken(rendering):
    """What each label says, and what ends its turn."""
    return [
        (rendering.text[label.start : label.end], rendering.text[label.end : label.stop])
        for label in rendering.labels
    ]


@pytest.mark.parametrize("kind", TALKING)
@pytest.mark.parametrize("talk", TALKS)
def test_answers_are_found_whole_in_every_template(kind, talk):
    said = TALKS[talk][1::2]
    rendering = render(tokenizer(kind), turns(*TALKS[talk]))
    assert spoken(rendering) == [(text, END[kind]) for text in said]
    assert [piece.text for piece in rendering.pieces] == list(said)
    for piece, label in zip(rendering.pieces, rendering.labels, strict=True):
        assert piece.matches == ((0, len(piece.text), label.start),)
    assert rendering.trained == [(label.start, label.end) for label in rendering.labels]


@pytest.mark.parametrize("kind", TALKING)
def test_the_rendering_is_the_templates_up_to_the_last_answer(kind):
    tok, row = tokenizer(kind), turns("Count.", "1, 2", "On.", "3, 4", "And?")
    rendering = render(tok, row)
    assert rendering.text.endswith("3, 4" + END[kind])
    if tok.chat_template:
        whole = tok.apply_chat_template(row["messages"], tokenize=False)
        assert whole.startswith(rendering.text)


@pytest.mark.parametrize("kind", TALKING)
def test_only_the_last_turn_of_the_assistant(kind):
    rendering = render(tokenizer(kind), turns("a", "first", "b", "second"), train_turns="last")
    assert spoken(rendering) == [("second", END[kind])]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "zephyr", "gemma", "mistral", "plain"])
def test_every_turn(kind):
    row = turns("a question", "an answer", "another")
    rendering = render(tokenizer(kind), row, train_turns="all")
    assert [piece.text for piece in rendering.pieces] == [m["content"] for m in row["messages"]]
    for piece in rendering.pieces:
        assert len(piece.matches) == 1
        start, end, at = piece.matches[0]
        assert rendering.text[at : at + end - start] == piece.text
        assert any(label.start <= at and at < label.end for label in rendering.labels)


def test_labels_never_overlap_where_a_template_moves_turns():
    """Mistral writes the system prompt into the last user turn, behind an earlier answer."""
    rendering = render(tokenizer("mistral"), turns("q", "a", "r", "b"), train_turns="all")
    edges = [x for label in rendering.labels for x in label]
    assert edges == sorted(edges)


def test_an_unknown_choice_of_turns():
    with pytest.raises(ValueError, match=r"train_turns must be one of .*'user'"):
        render(tokenizer("chatml"), turns("a", "b"), train_turns="user")


# --- templates that change contents ---


@pytest.mark.parametrize("kind", ["llama3", "gemma", "llama2"])
def test_a_trimmed_content_is_found_without_its_edges(kind):
    rendering = render(tokenizer(kind), turns("q", "\n two words \n"))
    (piece,) = rendering.pieces
    assert piece.text == "\n two words \n"
    (match,) = piece.matches
    assert "two words" in piece.text[match.start : match.end]
    assert rendering.text[match.at : match.stop] == piece.text[match.start : match.end]
    assert spoken(rendering)[0][0].strip() == "two words"
    assert spoken(rendering)[0][1].strip() == END[kind].strip()


THINKING = "<think>\nTwo and two.\n</think>\n\nFour."


def test_thoughts_that_are_dropped_from_earlier_turns():
    rendering = render(tokenizer("qwen3"), turns("2 + 2?", THINKING, "3 + 3?", THINKING))
    first, last = rendering.pieces
    assert first.matches == ((len(THINKING) - 5, len(THINKING), rendering.labels[0].start),)
    assert spoken(rendering)[0] == ("Four.", "<|im_end|>")
    # The last turn keeps them, and the template writes them as the row does: one match.
    assert last.matches == ((0, len(THINKING), rendering.labels[1].start),)
    assert spoken(rendering)[1] == (THINKING, "<|im_end|>")


def test_a_thought_that_is_the_answer_already():
    content = "<think>\nFour.\n</think>\n\nFour."
    rendering = render(tokenizer("qwen3"), turns("2 + 2?", content, "Sure?", "Yes."))
    assert rendering.pieces[0].matches == (
        (content.rfind("Four."), len(content), rendering.labels[0].start),
    )


def test_thoughts_that_are_written_anew():
    """The template adds line breaks; thought and answer are still found."""
    content = "<think>Two and two.</think>Four."
    rendering = render(tokenizer("qwen3"), turns("2 + 2?", content))
    (piece,) = rendering.pieces
    found = [content[start:end] for start, end, _ in piece.matches]
    assert "".join(found).replace("<think>", "") == "Two and two.Four."
    for start, end, at in piece.matches:
        assert rendering.text[at : at + end - start] == content[start:end]
    assert spoken(rendering)[0][0].endswith("Two and two.\n</think>\n\nFour.")


def test_thoughts_that_are_dropped_everywhere():
    rendering = render(tokenizer("deepseek"), turns("2 + 2?", THINKING))
    assert spoken(rendering) == [("\n\nFour.", "<|eos|>")]
    assert rendering.pieces[0].text == THINKING


def test_an_empty_thought_of_the_template_is_not_learnt():
    rendering = render(tokenizer("qwen3"), turns("q", "a", system=False))
    assert rendering.text.endswith("assistant\n<think>\n\n</think>\n\na<|im_end|>")
    assert spoken(rendering) == [("a", "<|im_end|>")]


def with_template(template):
    backend = tiny.byte_level_bpe(300, ["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def test_a_content_that_is_rewritten_has_no_match_but_is_learnt_as_written():
    tok = with_template("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}")
    rendering = render(tok, turns("q", "loud", "r", "LOUD", system=False))
    assert [piece.matches for piece in rendering.pieces] == [(), ((0, 4, 18),)]
    assert spoken(rendering) == [("LOUD", "</s>"), ("LOUD", "</s>")]


def test_a_message_that_is_left_out_has_neither_match_nor_label():
    tok = with_template("{% for m in messages[-2:] %}{{ m.content }}</s>{% endfor %}")
    rendering = render(tok, turns("q", "gone", "r", "kept", system=False))
    assert [piece.matches for piece in rendering.pieces] == [(), ((0, 4, 5),)]
    assert spoken(rendering) == [("kept", "</s>")]


def test_a_content_that_is_written_twice_has_no_match():
    tok = with_template("{% for m in messages %}{{ m.content }}|{{ m.content }}</s>{% endfor %}")
    rendering = render(tok, turns("q", "twice", system=False))
    assert rendering.pieces[0].matches == ()


def test_the_placeholder_itself_is_a_word_like_others():
    said = f"{sra.chat._MARK} and {sra.chat._MARK}99"
    assert spoken(render(tokenizer("chatml"), turns("q", said)))[0][0] == said


def test_a_template_without_ends_of_turns():
    """The start token of the next turn is not taken for one."""
    tok = with_template("{% for m in messages %}{{ bos_token + m.content }}{% endfor %}")
    rendering = render(tok, turns("q", "a", "r", "b", system=False))
    assert spoken(rendering) == [("a", ""), ("b", "")]


def test_special_tokens_inside_a_content():
    said = "write <|im_end|> to end"
    assert spoken(render(tokenizer("chatml"), turns("q", said))) == [(said, "<|im_end|>")]


# --- tools ---

CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "sum", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "adds", "parameters": {}}}]
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "name": None},
        {"role": "assistant", "content": "It is 42.", "tool_calls": []},
    ],
    "tools": TOOLS,
}


@pytest.mark.parametrize(
    ("kind", "opening", "end"),
    [
        ("chatml", "assistant\n", "<|im_end|>"),
        ("llama3", "<|end_header_id|>\n\n", "<|eom_id|>"),
        ("mistral", "[/INST]", "</s>"),
        ("plain", "Add.\n", "</s>"),
    ],
)
def test_a_turn_that_calls_is_learnt_whole_as_its_template_writes_it(kind, opening, end):
    rendering = render(tokenizer(kind), TOOL_ROW)
    assert [piece.text for piece in rendering.pieces] == ["It is 42."]
    (call, stop), answer = spoken(rendering)
    assert stop == end
    assert '"sum"' in call
    assert "Add." not in call
    assert "42" not in call
    assert rendering.text[: rendering.labels[0].start].endswith(opening)
    assert answer[0] == "It is 42."
    assert answer[1] == END[kind]


def test_a_turn_that_speaks_and_calls():
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    ]
    rendering = render(tokenizer("chatml"), {"messages": messages, "tools": TOOLS})
    assert [piece.text for piece in rendering.pieces] == ["Let me see."]
    ((said, end),) = spoken(rendering)
    assert said.startswith("Let me see.<tool_call>")
    assert end == "<|im_end|>"


def test_tools_reach_the_template_also_as_a_string():
    rendering = render(tokenizer("chatml"), TOOL_ROW)
    assert rendering.text.startswith("<|im_start|>system\nTools: [")
    assert render(tokenizer("chatml"), TOOL_ROW | {"tools": json.dumps(TOOLS)}) == rendering
    assert render(tokenizer("chatml"), TOOL_ROW | {"tools": []}).text.startswith(
        "<|im_start|>user\nAdd."
    )


# --- prompts, texts, no template ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_stands_behind_the_prompt(kind):
    tok = tokenizer(kind)
    row = {"prompt": "Say it.", "completion": "it"}
    for chat_template in (True, False):
        rendering = render(tok, row, chat_template=chat_template)
        prompt = render_prompt(tok, "Say it.", chat_template=chat_template)
        end = END[kind] if chat_template and tok.chat_template else tok.eos_token
        assert rendering.text == f"{prompt}it{end}"
        assert spoken(rendering) == [("it", end)]
        assert rendering.pieces == (("it", ((0, 2, len(prompt)),)),)


def test_one_exchange_without_a_template_is_a_prompt_and_a_completion():
    for tok in (tokenizer("plain"), tiny.student_tokenizer()):
        row = {"prompt": "q", "completion": "a"}
        assert render(tok, row) == render(tok, turns("q", "a", system=False))


def test_several_turns_without_a_template():
    rendering = render(tokenizer("chatml"), turns("q", "a", "r", "b"), chat_template=False)
    assert rendering.text == "Be brief. assistant\nq\na<|im_end|>r\nb<|im_end|>"


def test_a_text_is_learnt_whole():
    for kind in KINDS:
        rendering = render(tokenizer(kind), {"text": "Once upon"})
        assert spoken(rendering) == [("Once upon", tokenizer(kind).eos_token)]
        assert rendering.text.startswith("Once upon")  # these tokenizers add no start token


def test_a_start_token_that_the_tokenizer_adds_is_written():
    tok = tiny.byte_level_bpe(300, ["<s>", "</s>"])
    tok.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    assert render(tok, {"text": "x"}).text == "<s>x</s>"
    assert render(tok, turns("q", "a")).text.startswith("<s>Be brief")


def test_lone_surrogates_become_replacement_characters():
    rendering = render(tokenizer("chatml"), turns("\ud800", "b\udc00"))
    assert spoken(rendering)[0][0] == "b\ufffd"
    rendering.text.encode()


# --- templates that refuse ---


def test_a_template_that_refuses_says_so_in_its_own_words():
    message = r"chat template of .*cannot write this conversation: System role not supported"
    with pytest.raises(ValueError, match=message):
        render(tokenizer("gemma-strict"), turns("q", "a"))
    render(tokenizer("gemma-strict"), turns("q", "a", system=False))
    with pytest.raises(ValueError, match="roles must alternate"):
        render(tokenizer("mistral"), {"messages": turns("q", "a")["messages"][::-1]})


def test_a_template_that_fails_on_an_undefined_name():
    tok = with_template("{{ messages[0].content + missing.name }}")
    with pytest.raises(ValueError, match="'missing' is undefined"):
        render(tok, turns("q", "a"))
