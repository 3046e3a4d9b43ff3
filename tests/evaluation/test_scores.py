"""`sra evaluate`: what it measures, what it keeps, and how it goes on after a stop."""

from __future__ import annotations

import argparse
import json

import pytest

from sra import bits_per_byte
from sra.commands import evaluate as command
from sra.evaluation import scores
from sra.evaluation.scores import Teacher, evaluate, load_references
from sra.evaluation.span_comparison import span_agreement
from tests import tiny

SHORT = {"max_length": 96, "max_prompt_length": 80}


def run(*argv):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, argv)])
    return args.run(args)


@pytest.fixture
def teacher():
    return Teacher(
        tiny.teacher_model(), tiny.teacher_tokenizer(), tiny.collator(), tiny.vocabulary()
    )


def test_it_measures_what_was_asked_for(teacher):
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    found = evaluate(
        student, tokenizer, tiny.ROWS, metrics=("bits_per_byte", "agreement"), teacher=teacher
    )
    assert found["rows"] == len(tiny.ROWS)
    assert found["bits_per_byte"] == bits_per_byte(student, tokenizer, tiny.ROWS)
    assert found["teacher_bits_per_byte"] == bits_per_byte(
        teacher.model, teacher.tokenizer, tiny.ROWS
    )
    assert found["agreement"] == span_agreement(
        student, teacher.model, tiny.ROWS, teacher.collator, teacher.vocabulary
    )
    assert "rouge_l" not in found


def test_rouge_over_seeds_and_references(tmp_path):
    pytest.importorskip("rouge_score", reason="the package rouge-score is not installed")
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    rows = [{**row, "completion": [row["completion"], "another"]} for row in tiny.ROWS[:3]]
    found = evaluate(
        student, tokenizer, rows, metrics=["rouge_l"], seeds=[1, 2], output=tmp_path, **SHORT
    )
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").open()]
    assert [(line["seed"], line["row"]) for line in lines] == [
        (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)
    ]  # fmt: skip
    assert set(lines[0]) == {"row", "seed", "prompt", "text", "score"}
    means = [sum(line["score"] for line in lines if line["seed"] == s) / 3 for s in (1, 2)]
    assert found["rouge_l"]["seeds"] == pytest.approx({"1": means[0], "2": means[1]})
    assert found["rouge_l"]["mean"] == pytest.approx(sum(means) / 2)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))


def test_a_stopped_evaluation_goes_on_at_the_next_seed(tmp_path, monkeypatch):
    pytest.importorskip("rouge_score", reason="the package rouge-score is not installed")
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    made = []
    real = scores.answer

    def dies_at_the_second(*args, seed, **options):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(seed)
        return real(*args, seed=seed, **options)

    options = {"metrics": ["bits_per_byte", "rouge_l"], "seeds": [1, 2, 3], **SHORT}
    monkeypatch.setattr(scores, "answer", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(student, tokenizer, tiny.ROWS, output=tmp_path / "a", **options)
    assert not list((tmp_path / "a").glob(".*"))

    def counted(*args, seed, **options):
        made.append(seed)
        return real(*args, seed=seed, **options)

    monkeypatch.setattr(scores, "answer", counted)
    monkeypatch.setattr(scores, "bits_per_byte", lambda *a, **k: pytest.fail("measured again"))
    resumed = evaluate(student, tokenizer, tiny.ROWS, output=tmp_path / "a", **options)
    assert made == [1, 2, 3]
    monkeypatch.setattr(scores, "bits_per_byte", bits_per_byte)
    whole = evaluate(student, tokenizer, tiny.ROWS, output=tmp_path / "b", **options)
    assert resumed == whole
    files = [(tmp_path / side / "generations.jsonl").read_text() for side in "ab"]
    assert files[0] == files[1]


def test_answers_without_their_settings_are_made_anew(tmp_path):
    pytest.importorskip("rouge_score", reason="the package rouge-score is not installed")
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    options = {"metrics": ["rouge_l"], "output": tmp_path, **SHORT}
    rows = [*tiny.ROWS[:2], tiny.ROWS[2] | {"prompt": "half \ud83d of a pair"}]
    first = evaluate(student, tokenizer, rows, seeds=[1], **options)["rouge_l"]
    both = evaluate(student, tokenizer, rows, seeds=[1, 2], **options)["rouge_l"]
    assert both["seeds"].keys() == {"1", "2"}
    assert evaluate(student, tokenizer, rows, seeds=[1], **options)["rouge_l"] == first
    (tmp_path / "results.json").unlink()
    path = tmp_path / "generations.jsonl"
    lines = [json.loads(line) | {"score": 99.0} for line in path.open(encoding="utf-8")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate(student, tokenizer, rows, seeds=[1], **options)["rouge_l"] == first


def test_results_of_other_settings_are_not_mixed(tmp_path):
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    evaluate(student, tokenizer, tiny.ROWS, output=tmp_path)
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(ValueError, match=r"other settings \(max_length: 512 → 100\)"):
        evaluate(student, tokenizer, tiny.ROWS, output=tmp_path, max_length=100)
    with pytest.raises(ValueError, match=r"other settings \(data: "):
        evaluate(student, tokenizer, tiny.ROWS[1:], output=tmp_path)
    assert (tmp_path / "results.json").read_text() == before


def test_what_cannot_be_measured_says_so_before_it_writes(tmp_path):
    student, tokenizer = tiny.student_model(), tiny.student_tokenizer()
    output = tmp_path / "out"
    for metrics, message in (
        (["rouge"], "There is no metric 'rouge'"),
        (["agreement"], "compares with a teacher"),
        (["rouge_l"], "Row 0 has no 'completion'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(student, tokenizer, [{"text": "x"}], metrics=metrics, output=output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1", "line 2: not JSON"),
        ('{"prompt": "x"}', "line 2"),
        ('{"prompt": "x", "completion": []}', "line 2: the list of references is empty"),
        ('{"prompt": "x", "completion": ["a", 3]}', "line 2"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "x", "completion": ["y", "z"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_references(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_references(tmp_path / "nowhere.jsonl")


def test_references_are_cleaned_as_rows_are(tmp_path):
    path = tmp_path / "data.jsonl"
    row = r'{"prompt": "a \ud83d", "completion": ["b \ud83d", "c"]}'
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")  # as editors on Windows write it
    assert load_references(path) == [{"prompt": "a �", "completion": ["b �", "c"]}]


def test_the_command(tmp_path, capsys):
    student, teacher = tiny.write_checkpoints(tmp_path)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.ROWS)
    argv = [student, "--data", data, "--teacher", teacher, "--limit", 4, "--cpu"]
    assert run(*argv, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"] == 4
    assert f"{results['bits_per_byte']:.4f}" in shown
    assert f"{results['teacher_bits_per_byte']:.4f}" in shown
    assert f"{results['agreement']:.1%}" in shown
    assert "of so many bytes" not in shown
    assert run(*argv, "--max-length", 30) == 0  # cuts the texts of each in another place
    assert "of so many bytes" in capsys.readouterr().out
    # The weights change: what was measured of the old ones is not taken for theirs.
    tiny.student_model(seed=9).save_pretrained(student)
    with pytest.raises(ValueError, match=r"other settings \(weights"):
        run(*argv, "--output", tmp_path / "out")
    tiny.teacher_model(seed=9).save_pretrained(teacher)
    with pytest.raises(ValueError, match="teacher_weights"):
        run(*argv, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="--limit 0"):
        run(student, "--data", data, "--limit", 0)
