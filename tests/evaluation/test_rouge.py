"""ROUGE-L: its known answers, and the sampling that it scores."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sra.evaluation.rouge import Question, _prompt_ids, _scorer, answer, rouge_l
from tests import tiny

pytest.importorskip("rouge_score", reason="the package rouge-score is not installed")

QUESTIONS = [Question(row["prompt"], (row["completion"],)) for row in tiny.ROWS]


@pytest.fixture
def model():
    made = tiny.student_model(tied=False)
    made.lm_head.weight.data.mul_(12)  # predictions far from uniform
    return made


def texts(answers):
    return [one.text for one in answers]


def test_known_answers():
    assert rouge_l(["the cat sat"], "the cat sat") == pytest.approx(100)
    # Common: "the ... sat". Precision 2/2, recall 2/3.
    assert rouge_l(["the cat sat"], "the sat") == pytest.approx(100 * 2 * (2 / 3) / (1 + 2 / 3))
    assert rouge_l(["sat cat the"], "the cat sat") == pytest.approx(100 / 3)  # in order
    assert rouge_l(["he runs"], "He is running!") == pytest.approx(100 * 2 * (2 / 3) / (5 / 3))
    assert rouge_l(["unrelated", "the cat sat"], "the cat sat") == pytest.approx(100)
    assert rouge_l(["the cat sat"], "") == 0


def test_words_of_other_scripts():
    assert rouge_l(["猫坐着。"], "猫站着") == pytest.approx(100 * 2 / 3)  # a word each
    assert rouge_l(["кот сидит"], "кот бежит") == pytest.approx(50)
    assert rouge_l(["用print打印3次"], "用print！") == pytest.approx(
        100 * 2 * (2 / 6) / (1 + 2 / 6)
    )
    assert rouge_l(["हिन्दी भाषा"], "हिन्दी") == pytest.approx(100 * 2 / 3)
    assert rouge_l(["น้ำ"], "น้ำ") == pytest.approx(100)
    assert rouge_l(["ab дом"], "abдом") == pytest.approx(100)
    assert rouge_l(["。！"], "。！") == 0


def test_latin_script_is_as_rouge_score_has_it():
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=True)
    texts = [text for row in tiny.ROWS for text in row.values() if text.isascii()]
    texts += ["Größe, naïve cafés: 10²… e\u0301", "x_1 = f(2)\t# running\n", "½ — “quoted”"]
    for text in texts:
        assert _scorer()._tokenizer.tokenize(text) == words.tokenize(text)


def test_greedy_equals_a_plain_loop_for_every_batch_size(model):
    tokenizer = tiny.student_tokenizer()
    want = []
    for question in QUESTIONS:
        ids = tokenizer(question.prompt + "\n", add_special_tokens=False).input_ids
        start = len(ids)
        while len(ids) - start < 20:
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        want.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    for batch_size in (1, 3, 8):
        found = answer(
            model, tokenizer, QUESTIONS, greedy=True, batch_size=batch_size, max_length=84,
            max_prompt_length=64,
        )  # fmt: skip
        assert texts(found) == want
        assert [one.row for one in found] == list(range(len(QUESTIONS)))
        assert [one.score for one in found] == [
            rouge_l(q.references, text) for q, text in zip(QUESTIONS, want, strict=True)
        ]


def test_sampling_is_from_the_models_own_distribution(model):
    """One token after one prompt, many times; the model's own config asks for something else."""
    tokenizer = tiny.student_tokenizer()
    model.lm_head.weight.data.mul_(3)
    model.generation_config.update(
        top_k=1, temperature=0.1, repetition_penalty=9.0, do_sample=True, min_p=0.5
    )
    known = model.generation_config.to_dict()
    count = 600
    found = answer(
        model, tokenizer, QUESTIONS[:1] * count, batch_size=300, max_length=65, max_prompt_length=64
    )
    ids = tokenizer(QUESTIONS[0].prompt + "\n", add_special_tokens=False).input_ids
    shares = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    # Several tokens may have one text, once it is stripped.
    expected = Counter()
    for token, share in enumerate(shares.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True).strip()
        expected[text] += share
    seen = Counter(texts(found))
    checked = [(text, share) for text, share in expected.items() if 0.02 < share < 0.95]
    assert len(checked) >= 4
    for text, share in checked:
        assert seen[text] / count == pytest.approx(
            share, abs=4 * (share * (1 - share) / count) ** 0.5
        )
    assert model.generation_config.to_dict() == known


def test_seeds(model):
    tokenizer = tiny.student_tokenizer()
    options = {"max_length": 80, "max_prompt_length": 64}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = answer(model.train(), tokenizer, QUESTIONS, seed=10, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert texts(answer(model, tokenizer, QUESTIONS, seed=10, **options)) == texts(first)
    assert texts(answer(model, tokenizer, QUESTIONS, seed=20, **options)) != texts(first)
    assert {one.seed for one in first} == {10}


def test_a_long_prompt_loses_the_end_of_its_text_only():
    tokenizer = tiny.teacher_tokenizer()
    short = _prompt_ids(tokenizer, "Count to five.", 256, True)
    rendered = "<|begin|>user\nCount to five.<|end|>\n<|begin|>assistant\n"
    assert tokenizer.decode(short) == rendered
    cut = _prompt_ids(tokenizer, "Count to five." * 30, 60, True)
    assert len(cut) == 60
    assert tokenizer.decode(cut).startswith("<|begin|>user\nCount to five.Count")
    assert tokenizer.decode(cut).endswith("<|end|>\n<|begin|>assistant\n")
    plain = _prompt_ids(tokenizer, "Count to five." * 30, 10, False)
    assert plain[:9] == tokenizer("Count to five." * 30).input_ids[:9]
    assert tokenizer.decode(plain[9:]) == "\n"


def test_what_cannot_be_answered(model):
    with pytest.raises(ValueError, match="There is no question"):
        answer(model, tiny.student_tokenizer(), [])
    with pytest.raises(ValueError, match="max_length = 64 leaves no room"):
        answer(model, tiny.student_tokenizer(), QUESTIONS, max_length=64, max_prompt_length=64)
