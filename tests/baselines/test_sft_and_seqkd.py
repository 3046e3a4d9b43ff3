"""SFT, and the teacher's answers that make it SeqKD."""

from __future__ import annotations

import pytest
import torch

from sra import SpanAligner, SpanCollator, SpanDistiller, recipe
from sra.baselines.sft import SFT, teacher_completions
from tests import tiny

CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Count to five."},
        {"role": "assistant", "content": "1, 2, 3, 4, 5"},
        {"role": "user", "content": "Name a river of Egypt."},
        {"role": "assistant", "content": "The Nile."},
    ]
}
# Without the answer: tests/tiny.py's template, and how a row is written without one.
TEMPLATED = (
    "<|begin|>user\nCount to five.<|end|>\n<|begin|>assistant\n1, 2, 3, 4, 5<|end|>\n"
    "<|begin|>user\nName a river of Egypt.<|end|>\n<|begin|>assistant\n"
)
PLAIN = "Count to five.\n1, 2, 3, 4, 5<|end|>Name a river of Egypt.\n"


@pytest.fixture
def teacher():
    model = tiny.teacher_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9  # of a model in training mode alone
    return model.eval()


def greedy(model, tokenizer, text, count):
    """A plain loop, without padding or a cache."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = len(ids)
    while len(ids) - start < count:
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def asked(prompt):
    return f"<|begin|>user\n{prompt}<|end|>\n<|begin|>assistant\n"


def ending_first(model):
    """The same model, always sure that its answer ends here."""
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.TEACHER_ROWS))
    model.lm_head.bias.data[tiny.teacher_tokenizer().eos_token_id] = 50.0
    return model


def test_sft_is_cross_entropy():
    collator = SpanCollator(
        SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer()), max_length=256
    )
    batch, student = collator(tiny.ROWS), tiny.student_model()
    out = SpanDistiller(student, None, SFT())(**batch)
    want = SpanDistiller(student, None, recipe("cross-entropy"))(**batch)
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(out.loss, out.ce)
    assert not SFT().needs_teacher
    with pytest.raises(ValueError, match=r"alpha = 0.5: SFT is cross-entropy alone"):
        SFT(alpha=0.5)


def test_greedy_equals_a_plain_loop_for_every_batch_size(teacher):
    tokenizer = tiny.teacher_tokenizer()
    rows = [{**row, "teacher": "a"} for row in tiny.ROWS]
    want = [
        {**row, "completion": greedy(teacher, tokenizer, asked(row["prompt"]), 12)} for row in rows
    ]
    assert len({row["completion"] for row in want}) > 4
    for batch_size in (1, 3, 8):
        done = []
        got = teacher_completions(
            teacher.train(), tokenizer, iter(rows), max_new_tokens=12, batch_size=batch_size,
            progress=done.append,
        )  # fmt: skip
        assert got[:3] == (want, 0, 0)
        assert done == [*range(batch_size, 8, batch_size), 8]
        assert teacher.training
    assert rows[0]["completion"] == tiny.ROWS[0]["completion"]


@pytest.mark.parametrize(("chat_template", "prompt"), [(True, TEMPLATED), (False, PLAIN)])
def test_a_conversation(teacher, chat_template, prompt):
    tokenizer = tiny.teacher_tokenizer()
    said = greedy(teacher, tokenizer, prompt, 12)
    assert said != greedy(teacher, tokenizer, asked("Name a river of Egypt."), 12)
    (row,), *_ = teacher_completions(
        teacher, tokenizer, [CONVERSATION], max_new_tokens=12, chat_template=chat_template
    )
    assert row["messages"][:-1] == CONVERSATION["messages"][:-1]
    assert row["messages"][-1] == {"role": "assistant", "content": said}
    assert CONVERSATION["messages"][-1]["content"] == "The Nile."


def test_tools_and_keys_without_a_value_reach_the_template(teacher):
    tokenizer = tiny.teacher_tokenizer()
    seen = []
    known = tokenizer.apply_chat_template

    def recorded(messages, **options):
        seen.append((messages, options["tools"], options["add_generation_prompt"]))
        return known(messages, **options)

    messages = [{"role": "user", "content": "Hi.", "tool_calls": None}]
    row = {"messages": [*messages, {"role": "assistant", "content": "Yes?"}], "tools": '[{"a": 1}]'}
    tokenizer.apply_chat_template = recorded
    try:
        teacher_completions(teacher, tokenizer, [row], max_new_tokens=2)
    finally:
        del tokenizer.apply_chat_template
    assert seen == [([{"role": "user", "content": "Hi."}], [{"a": 1}], True)]


def test_samples(teacher):
    tokenizer = tiny.teacher_tokenizer()

    def sampled(seed):
        return teacher_completions(teacher, tokenizer, tiny.ROWS, max_new_tokens=8, seed=seed).rows

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = sampled(10)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled(10) == first
    assert sampled(20) != first
    greedy_ones = teacher_completions(teacher, tokenizer, tiny.ROWS, max_new_tokens=8).rows
    assert first != greedy_ones


def test_what_is_left_out(teacher):
    tokenizer = tiny.teacher_tokenizer()
    rows = [*tiny.ROWS[:2], {"prompt": "a long one " * 30, "completion": "short"}, CONVERSATION]
    limit = len(tokenizer(TEMPLATED).input_ids)
    got = teacher_completions(teacher, tokenizer, rows, max_new_tokens=4, max_prompt_length=limit)
    assert (len(got.rows), got.empty, got.long) == (3, 0, 1)
    assert got.cut == 3
    limited = teacher_completions(
        teacher, tokenizer, rows, max_new_tokens=4, max_prompt_length=limit - 1
    )
    assert limited == (got.rows[:2], 0, 2, 2)
    silent = teacher_completions(
        ending_first(teacher), tokenizer, rows, max_new_tokens=4, max_prompt_length=limit
    )
    assert silent == ([], 3, 1, 0)


def test_answers_that_do_not_end(teacher):
    """Ends are told from the limit by the end token, also where another row of the batch ends."""
    tokenizer = tiny.teacher_tokenizer()
    end = tokenizer.eos_token_id
    known = teacher.generate

    def ended(**options):
        out = known(**options)
        width = options["input_ids"].shape[1]
        out[:, width:].masked_fill_(out[:, width:] == end, 5)
        out[::2, width + 3] = end
        out[::2, width + 4 :] = tokenizer.pad_token_id
        return out

    whole = teacher_completions(teacher, tokenizer, tiny.ROWS, max_new_tokens=3).rows
    teacher.generate = ended
    kept = teacher_completions(teacher, tokenizer, tiny.ROWS, max_new_tokens=6)
    assert (len(kept.rows), kept.cut) == (8, 4)
    got = teacher_completions(teacher, tokenizer, tiny.ROWS, max_new_tokens=6, keep_cut=False)
    assert got == (whole[::2], 0, 0, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "A text."}, "Row 1: a text asks nothing"),
        ({"messages": CONVERSATION["messages"][:3]}, "messages are by user, assistant, user"),
        ({"messages": CONVERSATION["messages"][1:2]}, "messages are by assistant"),
        ({"prompt": "Why?"}, "Row 1: there is no 'completion'"),
    ],
)
def test_what_asks_nothing(teacher, row, message):
    with pytest.raises(ValueError, match=message):
        teacher_completions(
            teacher, tiny.teacher_tokenizer(), [tiny.ROWS[0], row], max_new_tokens=4
        )


def test_the_student_learns_from_the_answers(teacher):
    """SeqKD from end to end: what the teacher said becomes likelier."""
    rows = teacher_completions(teacher, tiny.teacher_tokenizer(), tiny.ROWS, max_new_tokens=8).rows
    aligner = SpanAligner(tiny.student_tokenizer(), tiny.teacher_tokenizer())
    batch = SpanCollator(aligner, max_length=256)(rows)
    module = SpanDistiller(tiny.student_model(), None, SFT())
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = module(**batch).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
