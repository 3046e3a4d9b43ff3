"""What `sra distill` is told, by a YAML file and by the command line."""

from __future__ import annotations

import pytest
import torch

from sra.arguments import help_text, parse, warmup


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: a\nteacher: [b, c]\ndata: d.jsonl\nlearning_rate: 3e-4\n"
        "recipe: paper\nlayers: ['-1:-1', '10:20:0.5']\nuse_cpu: true\nrun_name: null\n"
        "accelerator_config: {split_batches: false}\ngamma: 10\n"
    )
    given, config = parse([str(file), "--gamma", "3", "--use-cpu=false", "--cpu"])
    assert (given.model_name_or_path, given.data) == ("a", "d.jsonl")
    assert given.teacher_model_name_or_path == ["b", "c"]
    assert config.learning_rate == 3e-4  # YAML reads it as a string
    assert config.use_cpu is True
    objective = config.objective()
    assert objective.gamma == 3
    assert objective.layers == ((-1, -1, 1.0), (10, 20, 0.5))
    given, _ = parse([str(file), "x", "y"])
    assert (given.model_name_or_path, given.teacher_model_name_or_path) == ("x", ["y"])


def test_short_names_and_dashes():
    given, config = parse(
        ["a", "--batch-size", "3", "--accumulate=2", "--epochs", "2", "--output", "o", "--cpu",
         "--dtype", "float32", "--layers", "-2:-1", "--teacher_names", "big", "small", "--resume"]
    )  # fmt: skip
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (3, 2)
    assert (config.num_train_epochs, config.output_dir) == (2, "o")
    assert config.objective().layers == ((-2, -1, 1.0),)
    assert given.teacher_names == ["big", "small"]
    assert given.resume
    assert not config.bf16


@pytest.mark.skipif(torch.accelerator.is_available(), reason="its dtype is chosen, not the CPU's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_faster_dtype_of_a_cpu_is_taken_on_a_cpu(monkeypatch, dtype):
    monkeypatch.setattr("sra.arguments.faster_dtype", lambda device: dtype)
    _, config = parse(["s", "t", "--data", "rows.jsonl"])
    assert config.bf16 == (dtype == torch.bfloat16)
    assert config.device.type == "cpu"


def test_evaluation_follows_from_its_steps():
    assert (
        parse(["a", "--eval_data", "e", "--eval_steps", "5", "--cpu"])[1].eval_strategy == "steps"
    )
    assert parse(["a", "--eval_data", "e", "--cpu"])[1].eval_strategy == "no"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "--recpe", "paper"], r"no option 'recpe'. Did you mean 'recipe'\?"),
        (["a", "--learning-rat", "1"], r"Did you mean 'learning_rate'\?"),
        (["a", "--zzz", "1"], "no option 'zzz'. See sra distill --help"),
        (["a", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["a", "--granularity", "letter"], "invalid choice: 'letter'"),
        (["a", "--dtype", "int4"], "dtype = 'int4': choose auto, float32 or bfloat16"),
        (["a", "--layers", "1:2:3:4"], "'1:2:3:4' is no pair of layers"),
        (["a", "--min_coverage", "90"], "min_coverage = 90.0: it is a share"),
        (["--recipe", "paper"], "no student: sra distill STUDENT TEACHER"),
    ],
)
def test_what_is_not_understood(argv, message):
    with pytest.raises(ValueError, match=message):
        parse([*argv, "--cpu"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recpe: paper\n", r"no option 'recpe'. Did you mean 'recipe'\?"),
        ("- a\n- b\n", "holds no names and values"),
        ("a: [\n", "is no YAML"),
    ],
)
def test_files_that_are_not_understood(tmp_path, content, message):
    file = tmp_path / "run.yml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse([str(file), "--cpu"])
    with pytest.raises(FileNotFoundError, match="Give a YAML file"):
        parse([str(tmp_path / "none.yaml"), "--cpu"])


def test_words_that_yaml_takes_for_truth_values(tmp_path):
    file = tmp_path / "run.yml"
    file.write_text("save_strategy: no\npadding_free: on\nuse_peft: false\n")
    given, config = parse([str(file), "STUDENT", "--cpu"])
    assert config.save_strategy == "no"
    assert config.padding_free is True
    assert given.use_peft is False


def test_a_tenth_of_the_steps_warms_up():
    for more, steps in ((["--max_steps", "50"], 5), ([], 3)):
        arguments, config = parse(["a", "--cpu", "--batch_size", "4", *more])
        assert arguments.default_warmup
        warmup(config, 100)
        assert config.warmup_steps == steps
    for given in ("7", "0"):
        arguments, config = parse(["a", "--cpu", "--warmup-steps", given])
        assert not arguments.default_warmup
        assert config.warmup_steps == int(given)


def test_an_option_without_its_value():
    with pytest.raises(ValueError, match=r"^--eval-data has no value"):
        parse(["a", "--cpu", "--eval-data", "--data", "rows.jsonl"])
    arguments, _ = parse(["a", "--cpu", "--resume"])
    assert arguments.resume


def test_help_names_every_argument():
    shown, every = help_text(), help_text(every=True)
    for name in ("--teacher_cache", "--layers", "--learning_rate", "--output)"):
        assert name in shown
    assert "--adam_beta2" in every
    assert "--adam_beta2" not in shown
    assert max(map(len, shown.splitlines())) <= 100
