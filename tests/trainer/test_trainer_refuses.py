"""What SRATrainer refuses, before anything is written, and what it says."""

from __future__ import annotations

import json

import pytest
from transformers import TrainingArguments

from sra import SRAConfig, SRATrainer, stream_rows
from sra.run_record import read_record
from tests import tiny
from tests.trainer.cases import trainer


def test_too_little_coverage(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"Alignment covers .*minimum 90%.*row 1 with 0\.0%"):
        SRATrainer(
            tiny.student_model(),
            tiny.teacher_model(),
            SRAConfig(output_dir=str(folder), use_cpu=True, report_to="none"),
            train_dataset=[tiny.ROWS[0], tiny.ROWS[4]],
            processing_class=tiny.student_tokenizer(),
            teacher_processing_class=tiny.lossy_tokenizer(),
        )
    assert not folder.exists()


def test_coverage_that_falls_while_the_data_stream(tmp_path):
    """Nothing can be checked beforehand; a teacher that drops what it does not know is noticed."""
    good = [{"prompt": "Where?", "completion": "The Nile flows through Egypt."}] * 60
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [*good, *[tiny.ROWS[4]] * 40])
    run = SRATrainer(
        tiny.student_model(),
        tiny.teacher_model(),
        SRAConfig(
            output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", max_steps=100,
            per_device_train_batch_size=1, save_strategy="no", logging_steps=100,
            disable_tqdm=True,
        ),
        train_dataset=stream_rows(file),
        processing_class=tiny.student_tokenizer(),
        teacher_processing_class=tiny.lossy_tokenizer(),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Spans cover .* of the last 50 batches .*谢谢你"):
        run.train()
    assert 60 < run.state.global_step < 75


def test_resuming_where_there_is_nothing(tmp_path):
    run = trainer(tmp_path / "run")
    with pytest.raises(ValueError, match=r"run holds no whole checkpoint. Train without"):
        run.train(resume_from_checkpoint=True)


def test_one_process_with_several_gpus_uses_one(tmp_path, monkeypatch):
    seen = property(lambda args: args._n_gpu or 4)  # on a CPU it is 0
    monkeypatch.setattr(TrainingArguments, "n_gpu", seen)
    with pytest.warns(UserWarning, match="4 GPUs; it uses one. .*torchrun --nproc_per_node 4"):
        config = SRAConfig(output_dir=str(tmp_path), use_cpu=True)
    assert config.n_gpu == 1


@pytest.mark.parametrize("recipe", ["cross-entropy", "boundary"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "Row 8: there is no 'completion'"),
        ({"prompt": "x", "completion": " "}, "Row 8: the completion is empty"),
    ],
)
def test_a_row_that_cannot_be_learnt(tmp_path, recipe, row, message):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        trainer(folder, recipe=recipe, outside=None, rows=[*tiny.ROWS, row], max_length=100)
    assert not folder.exists()


def test_rows_whose_prompts_fill_max_length_are_left_out(tmp_path):
    long = {"prompt": "word " * 200, "completion": "y"}
    run = trainer(tmp_path / "run", rows=[*tiny.ROWS, long, long], max_length=100, max_steps=5)
    run.train()
    assert run.left_out == 2
    assert read_record(tmp_path / "run")["left_out"] == 2


def test_a_stream_of_nothing_but_such_rows_stops(tmp_path):
    file = tiny.write_jsonl(tmp_path / "a.jsonl", [{"prompt": "word " * 200, "completion": "y"}])
    run = trainer(tmp_path / "run", rows=stream_rows(file), max_length=100, max_steps=200)
    with pytest.raises(RuntimeError, match=r"nothing to learn in 50 steps: .*max_length = 100"):
        run.train()
    assert run.state.global_step == 49


def test_a_broken_row_of_the_held_out_data(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="Row 1 of eval_dataset: there is no 'prompt'"):
        SRATrainer(
            tiny.student_model(),
            None,
            SRAConfig(output_dir=str(folder), recipe="cross-entropy", use_cpu=True),
            train_dataset=tiny.ROWS,
            eval_dataset=[tiny.ROWS[0], {"completion": "x"}],
            processing_class=tiny.student_tokenizer(),
        )
    assert not folder.exists()


def test_a_broken_row_of_one_of_several_held_out_sets(tmp_path):
    with pytest.raises(ValueError, match=r"Row 1 of eval_dataset\['zh'\]: there is no 'prompt'"):
        SRATrainer(
            tiny.student_model(),
            None,
            SRAConfig(output_dir=str(tmp_path), recipe="cross-entropy", use_cpu=True),
            train_dataset=tiny.ROWS,
            eval_dataset={"en": tiny.ROWS[:1], "zh": [tiny.ROWS[4], {"completion": "x"}]},
            processing_class=tiny.student_tokenizer(),
        )


def test_rows_of_a_sample_keep_their_numbers(tmp_path, monkeypatch):
    """Of more rows than are checked, every third; the broken one is the last of these."""
    monkeypatch.setattr("sra.trainer.CHECKED_ROWS", 4)
    rows = [*tiny.ROWS, tiny.ROWS[0], {"prompt": "x"}, tiny.ROWS[0], tiny.ROWS[1]]
    with pytest.raises(ValueError, match="Row 9: there is no 'completion'"):
        trainer(tmp_path, rows=rows)
    lossy = [tiny.ROWS[0]] * 12
    lossy[6] = tiny.ROWS[4]
    with pytest.raises(ValueError, match=r"Worst is row 6 with 0\.0%"):
        SRATrainer(
            tiny.student_model(),
            tiny.teacher_model(),
            SRAConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none"),
            train_dataset=lossy,
            processing_class=tiny.student_tokenizer(),
            teacher_processing_class=tiny.lossy_tokenizer(),
        )


def test_no_teacher(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="needs a teacher"):
        SRATrainer(
            tiny.student_model(),
            args=SRAConfig(output_dir=str(folder), use_cpu=True),
            train_dataset=tiny.ROWS,
            processing_class=tiny.student_tokenizer(),
        )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "best"}, "There is no recipe 'best'"),
        ({"alpha": 2.0}, "alpha = 2.0"),
        ({"outside": "drop"}, "outside = 'drop'"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would remove the text"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1: .* Leave it 0"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0: .* Leave it unset"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SRAConfig(output_dir=str(tmp_path / "run"), **options)
    assert not (tmp_path / "run").exists()


def test_none_keeps_what_the_recipe_says():
    config = SRAConfig(output_dir="x", recipe="paper", gamma=0.0)
    assert config.objective().gamma == 0
    assert config.objective().temperature == 2
    assert json.loads(config.to_json_string())["recipe"] == "paper"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "normalised"),
        ({"recipe": "paper"}, "raw"),
        ({"recipe": "paper", "vocabulary_match": "normalised"}, "normalised"),
        ({"recipe": "boundary", "vocabulary_match": "raw"}, "raw"),
        ({"recipe": "paper", "method": "uld"}, "normalised"),
    ],
)
def test_vocabularies_are_paired_as_the_recipe_does(options, match):
    config = SRAConfig(output_dir="x", **options)
    assert config.vocabulary_match == match
    assert json.loads(config.to_json_string())["vocabulary_match"] == match
