"""The command line, on checkpoints small enough to train here."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sra.cli import main
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(student, teacher): checkpoint folders."""
    return tuple(map(str, tiny.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))))


@pytest.fixture
def data(tmp_path):
    return str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.ROWS))


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: p.detach() for name, p in model.named_parameters()}


def refused(capsys, argv, *written):
    """What a command that cannot run says: exit code 1, one message, nothing written."""
    assert main([str(a) for a in argv]) == 1
    _, found, said = capsys.readouterr().err.rpartition(f"sra {argv[0]}: ")  # after loading bars
    assert found
    assert "Traceback" not in said
    assert not any(Path(path).exists() for path in written)
    return said


# --- align ---


def test_align_shows_both_tokenizations(pair, capsys):
    assert main(["align", *pair, "--text", "The Nile flows."]) == 0
    shown = capsys.readouterr().out
    student = AutoTokenizer.from_pretrained(pair[0]).tokenize("The Nile flows.")
    teacher = AutoTokenizer.from_pretrained(pair[1]).tokenize("The Nile flows.")
    assert f"{len(student)} student and {len(teacher)} teacher tokens" in shown
    assert "coverage 100.0%" in shown
    assert "·╎Ni" in shown  # two tokens of the student
    assert "│ ·Ni" in shown  # one of the teacher


def test_align_reads_standard_input(pair, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Up on most maps."))
    assert main(["align", *pair, "--granularity", "word"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("5 spans over 16 bytes")


def test_align_without_a_model(pair, capsys, tmp_path):
    missing = str(tmp_path / "nowhere")
    said = refused(capsys, ["align", missing, pair[1], "--text", "x"])
    assert f"Cannot read the model {missing!r}: no such folder" in said


# --- distill ---


@pytest.mark.parametrize("recipe", ["respell", "boundary", "paper", "cross-entropy"])
def test_distill_from_end_to_end(pair, data, tmp_path, capsys, recipe):
    output = tmp_path / "run"
    argv = [
        "distill", *pair, "--data", data, "--eval-data", data, "--output", str(output),
        "--recipe", recipe, "--max-steps", "4", "--batch-size", "4", "--learning-rate", "3e-3",
        "--eval-steps", "2", "--save-steps", "2", "--cpu", "--remember-teacher",
    ]  # fmt: skip
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert f"The student is in {output / 'student'}." in said
    assert "Held-out bits per byte: " in said
    assert ("Spans cover" in said) == (recipe != "cross-entropy")
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2, 3, 4]
    trained, start = weights(output / "student"), weights(pair[0])
    assert any((trained[name] - start[name]).abs().max() > 1e-3 for name in start)
    text = tiny.ROWS[0]["completion"]
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (output / "student", pair[0])]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids


def test_distill_by_cross_entropy_takes_no_teacher(pair, data, tmp_path):
    output = tmp_path / "run"
    argv = ["distill", pair[0], "--recipe", "cross-entropy", "--data", data, "--cpu"]
    assert main([*argv, "--max-steps", "1", "--output", str(output)]) == 0
    assert (output / "student" / "model.safetensors").exists()


def test_every_switch_of_the_objective_is_reachable(pair, data, tmp_path, capsys):
    argv = ["distill", *pair, "--data", data, "--output", str(tmp_path / "run"), "--cpu"]
    for flag, value, message in (
        ("--alpha", "2", "alpha = 2.0"),
        ("--gamma", "-1", "gamma = -1.0"),
        ("--temperature", "0", "temperature = 0.0"),
        ("--beta", "0.5", "beta = 0.5 with direction = 'forward'"),
    ):
        assert message in refused(capsys, [*argv, flag, value], tmp_path / "run")
    for flag, value in (
        ("--logit-state", "com"), ("--outside", "bucket"), ("--normaliser", "sequences"),
        ("--vocabulary-match", "normalised"), ("--direction", "jsd"), ("--beta", "0.3"),
    ):  # fmt: skip
        argv += [flag, value]
    assert main([*argv, "--max-steps", "1"]) == 0


# --- what cannot run says so before it writes ---


def test_a_teacher_is_read_in_the_dtype_of_the_run(pair, data, tmp_path, monkeypatch):
    seen = []
    known = AutoModelForCausalLM.from_pretrained

    def recorded(path, **options):
        seen.append((Path(path).name, options["dtype"]))
        return known(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    argv = ["distill", *pair, "--data", data, "--output", tmp_path / "run", "--cpu"]
    argv += ["--max-steps", "1", "--dtype", "bfloat16"]
    assert main([str(a) for a in argv]) == 0
    assert dict(seen) == {"tiny-student": torch.float32, "tiny-teacher": torch.bfloat16}
    seen.clear()
    argv = ["evaluate", pair[0], "--teacher", pair[1], "--data", data, "--dtype", "bfloat16"]
    assert main([*argv, "--cpu"]) == 0
    assert dict(seen) == {"tiny-student": torch.bfloat16, "tiny-teacher": torch.bfloat16}


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_is_trusted_by_every_command_that_is_told_to(
    pair, data, tmp_path, monkeypatch, trusted
):
    seen = []
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):

        def recorded(path, *args, kind=kind, known=kind.from_pretrained, **options):
            trust = options.get("trust_remote_code")  # None: transformers asks at the terminal
            seen.append((kind is AutoConfig, Path(path).name, trust))
            return known(path, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", recorded)
    flag = ["--trust-remote-code"] if trusted else []
    out = str(tmp_path / "run")
    commands = (
        ["align", *pair, "--text", "The Nile flows."],
        ["doctor", *pair, "--data", data, "--cpu", "--measure", "1"],
        ["cache", pair[1], "--data", data, "--out", str(tmp_path / "cache"), "--cpu"],
        ["distill", *pair, "--data", data, "--output", out, "--cpu", "--max-steps", "1"],
        ["evaluate", pair[0], "--teacher", pair[1], "--data", data, "--cpu"],
        ["report", out, "--data", data, "--cpu"],
    )
    for command in commands:
        seen.clear()
        main([*command, *flag])
        names = {Path(path).name for path in pair if path in command or command[0] == "report"}
        assert names <= {name for config, name, _ in seen if not config}, command
        assert {trust for config, _, trust in seen if not config} == {trusted}, command
        if command[0] == "doctor":  # the others read configurations inside of models alone
            assert names <= {name for _, name, trust in seen if trust == trusted}


def test_a_cache_is_of_the_teacher_that_is_named(pair, data, tmp_path, capsys, monkeypatch):
    cache, out = str(tmp_path / "cache"), str(tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    assert main(["cache", pair[1], "--data", data, "--out", cache, "--cpu"]) == 0
    shared = ["--teacher-cache", cache, "--data", data, "--output", out, "--cpu"]
    assert main(["distill", pair[0], str(other), *shared]) == 1
    said = capsys.readouterr().err
    assert f"{cache} holds the states of {pair[1]}, and {other} is named" in said
    assert main(["distill", *pair, *shared, "--remember-teacher"]) == 1
    assert "come from --teacher-cache already" in capsys.readouterr().err
    monkeypatch.chdir(Path(pair[1]).parent)  # the same folder by another name
    assert main(["distill", pair[0], Path(pair[1]).name, *shared, "--max-steps", "1"]) == 0


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("evaluate", "--batch-size"),
        ("evaluate", "--max-prompt-length"),
        ("doctor", "--measure"),
        ("cache", "--batch-size"),
        ("report", "--batch-size"),
    ],
)
def test_counts_are_positive(pair, data, tmp_path, capsys, command, option):
    argv = {
        "evaluate": [pair[0]],
        "doctor": [*pair],
        "cache": [pair[1], "--out", str(tmp_path / "cache")],
        "report": [str(tmp_path)],
    }[command]
    assert main([command, *argv, "--data", data, option, "-1"]) == 1
    assert f"{option} -1: it must be at least 1" in capsys.readouterr().err


def test_output_where_there_is_no_utf_8(pair):
    argv = [sys.executable, "-m", "sra.cli", "align", *pair, "--text", "The Nile"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    shown = subprocess.run(argv, capture_output=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert b"Ni" in shown.stdout


def test_a_missing_model(pair, data, capsys, tmp_path):
    output, missing = tmp_path / "run", str(tmp_path / "nowhere")
    for models in ((missing, pair[1]), (pair[0], missing)):
        argv = ["distill", *models, "--data", data, "--output", output, "--cpu"]
        assert f"Cannot read the model {missing!r}" in refused(capsys, argv, output)


def test_a_damaged_model(pair, data, capsys, tmp_path):
    output, damaged = tmp_path / "run", tmp_path / "damaged"
    shutil.copytree(pair[0], damaged)
    weights_file = damaged / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-100])
    argv = ["distill", damaged, pair[1], "--data", data, "--output", output, "--cpu"]
    assert "The file is damaged: copy the model again" in refused(capsys, argv, output)


def test_a_folder_without_a_tokenizer(pair, data, capsys, tmp_path):
    output, bare = tmp_path / "run", tmp_path / "bare"
    shutil.copytree(pair[0], bare)
    for path in bare.glob("*token*"):
        path.unlink()
    argv = ["distill", bare, pair[1], "--data", data, "--output", output, "--cpu"]
    assert "tokenizer" in refused(capsys, argv, output)


def test_missing_data(pair, capsys, tmp_path):
    output, missing = tmp_path / "run", tmp_path / "nowhere.jsonl"
    argv = ["distill", *pair, "--data", missing, "--output", output, "--cpu"]
    assert f"{missing}: no such file" in refused(capsys, argv, output)


def test_a_broken_line_of_the_data(pair, data, capsys, tmp_path):
    output, broken = tmp_path / "run", tmp_path / "broken.jsonl"
    broken.write_text(Path(data).read_text() + '{"prompt": "x"}\n')
    for given in (["--data", broken], ["--data", data, "--eval-data", broken]):
        argv = ["distill", *pair, *given, "--output", output, "--cpu"]
        assert f"{broken}, line 9: there is no 'completion'" in refused(capsys, argv, output)


def test_there_is_no_data(pair, capsys, tmp_path):
    argv = ["distill", *pair, "--output", tmp_path / "run"]
    assert "add --data rows.jsonl" in refused(capsys, argv, tmp_path / "run")


def test_help_of_distill(capsys):
    for argv in (["distill"], ["distill", "--help"], ["distill", "--help-all"]):
        assert main(argv) == 0
        assert "--teacher_cache" in capsys.readouterr().out


def test_a_teacher_is_missing(pair, data, capsys, tmp_path):
    output = tmp_path / "run"
    argv = ["distill", pair[0], "--data", data, "--output", output]
    said = "needs a teacher: sra distill STUDENT TEACHER"
    assert f"The recipe 'respell' {said}" in refused(capsys, argv, output)
    argv += ["--method", "uld"]
    assert f"The method 'uld' {said}" in refused(capsys, argv, output)


def test_rows_that_are_left_out_are_counted(pair, tmp_path, capsys):
    rows = [*tiny.ROWS, {"prompt": "word " * 200, "completion": "y"}]
    data = tiny.write_jsonl(tmp_path / "long.jsonl", rows)
    argv = ["distill", *pair, "--data", data, "--output", tmp_path / "run", "--max-steps", "1",
            "--max-length", "100", "--cpu"]  # fmt: skip
    assert main([*map(str, argv)]) == 0
    said = f"1 of the {len(rows)} rows that were looked at are left out: their prompts fill max_"
    assert said in capsys.readouterr().out


def test_too_little_coverage(pair, data, capsys, tmp_path):
    output, lossy = tmp_path / "run", tmp_path / "lossy"
    shutil.copytree(pair[1], lossy)
    for path in lossy.glob("*token*"):
        path.unlink()
    (lossy / "chat_template.jinja").unlink(missing_ok=True)
    tiny.lossy_tokenizer().save_pretrained(lossy)
    argv = ["distill", pair[0], lossy, "--data", data, "--output", output, "--cpu"]
    said = refused(capsys, argv, output)
    assert "Alignment covers" in said
    assert "lower min_coverage" in said


def test_a_folder_with_a_run_is_not_written_over(pair, data, capsys, tmp_path):
    output = tmp_path / "run"
    argv = ["distill", *pair, "--data", data, "--output", output, "--cpu", "--max-steps", "1"]
    assert main([str(a) for a in argv]) == 0
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    said = refused(capsys, argv)
    assert "holds a run already (checkpoint-1). Go on with --resume" in said
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before
    shutil.rmtree(output / "checkpoint-1")
    for more in ([], ["--resume"]):
        assert "holds a student already, and no checkpoint" in refused(capsys, [*argv, *more])


@pytest.mark.parametrize(
    "argv", [[], ["distil"], ["align", "s"], ["align", "s", "t", "--granularity", "letter"]]
)
def test_a_command_that_does_not_parse(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: sra" in capsys.readouterr().err


# --- a process ---


def python(*argv, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "sra.cli", *map(str, argv)], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_help_needs_no_model_library():
    out, _ = python("--help").communicate(timeout=60)
    for command in ("align", "distill", "demo"):
        assert command in out
    code = (
        "import sys; from sra import cli; cli.parser().format_help();"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_bench_passes_its_options_on(capfd):
    assert main(["bench", "--list", "--op", "span_com", "--only", "one long span"]) == 0
    line, *others = capfd.readouterr().out.splitlines()
    assert line.startswith("span_com: case=4,096 × 2,048, one long span ")
    assert not others


def test_bench_says_where_the_benchmarks_are(capsys, monkeypatch, tmp_path):
    elsewhere = tmp_path / "sra" / "commands" / "bench.py"
    monkeypatch.setattr("sra.commands.bench.__file__", str(elsewhere))
    assert "in the source repository" in refused(capsys, ["bench", "--list"])


def test_an_unknown_option_of_another_command_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--list"])
    assert "unrecognized arguments: --list" in capsys.readouterr().err
