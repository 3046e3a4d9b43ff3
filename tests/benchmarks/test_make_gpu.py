"""`make gpu` as far as a machine without a GPU can tell."""

import csv
import json

import pytest
import torch

from benchmarks import gpu, gpu_step, gpu_targets, registry, run
from benchmarks.shapes import Shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("program", "argv"), [(gpu.main, []), (run.main, ["--device", "cuda"])], ids=["make", "bench"]
)
def test_without_a_gpu_it_says_so(program, argv, capsys):
    with pytest.raises(SystemExit):
        program(argv)
    assert "torch sees no GPU on this machine" in capsys.readouterr().err


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(run, "machine", lambda: {"commit": "abc", "gpu": "H100"})


def test_a_step_that_is_done_is_not_run_again(on_h100, monkeypatch, tmp_path):
    ran = []

    def step(out):
        ran.append(out)
        return len(ran) > 1

    assert not gpu.run_step("ops", step, tmp_path, again=False)  # fails, so it leaves no mark
    assert gpu.run_step("ops", step, tmp_path, again=False)
    assert gpu.run_step("ops", step, tmp_path, again=False)
    assert len(ran) == 2
    assert gpu.run_step("ops", step, tmp_path, again=True)
    monkeypatch.setattr(run, "machine", lambda: {"commit": "later", "gpu": "H100"})
    assert gpu.run_step("ops", step, tmp_path, again=False)
    assert len(ran) == 4


def test_a_program_is_stopped_at_its_limit_and_leaves_its_log(tmp_path, capsys):
    shell = ["sh", "-c"]
    assert gpu.call(tmp_path, "good", [*shell, "echo first; echo last"], 20)
    assert not gpu.call(tmp_path, "bad", [*shell, "echo why; exit 3"], 20)
    assert not gpu.call(tmp_path, "slow", [*shell, "echo begun; exec sleep 60"], 1)
    assert "good: last" in capsys.readouterr().out
    assert (tmp_path / "slow.txt").read_text() == "begun\n\nstopped after 1 s\n"


def measured(folder, target, **figures):
    row = {"provider": "ours", "case": target.case, **target.how, **figures}
    with (folder / f"{target.op}.csv").open("w") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)


def test_each_target_stands_beside_its_figure(tmp_path):
    com, kl, linear = gpu_targets.TARGETS[:3]
    measured(tmp_path, com, median_ms="0.05", pct_of_roofline="84")
    measured(tmp_path, kl, median_ms="2", pct_of_roofline="80")
    measured(tmp_path, linear, median_ms="37", peak_mib="3000")
    (tmp_path / "step.json").write_text(json.dumps({"loss in % of the step": 4.2}))
    lines = gpu_targets.summary(tmp_path).splitlines()[2:]
    found = [[cell.strip() for cell in line.split("|")[3:6]] for line in lines if line]
    assert found == [
        ["≥ 85 % of a copy", "84", "missed"],
        ["≤ 1.6 × its three passes", "1.25", "met"],
        ["≤ 38 ms", "37", "met"],
        ["≤ 2.5 GB above the inputs", "3.15", "missed"],
        ["≤ 56 ms", "", "not measured"],
        ["≤ 0.5 ms", "", "not measured"],
        ["≤ 5 % of a step", "4.2", "met"],
    ]


def test_every_target_has_its_case():
    for target in gpu_targets.TARGETS:
        cases = [registry.columns(case) for case in registry.load(target.op).gpu]
        wanted = {"case": target.case, **target.how}
        assert any(wanted.items() <= case.items() for case in cases), target


def test_a_case_of_this_commit_and_gpu_is_not_measured_again(on_h100, tmp_path):
    path, case = tmp_path / "span_geometry.csv", registry.load("span_geometry").gpu[0]
    assert not run._recorded(path, case)
    row = {**registry.columns(case), "commit": "abc", "gpu": "H100"}
    for changed, recorded in (({}, True), ({"commit": "old"}, False), ({"gpu": "A100"}, False)):
        with path.open("w") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row | changed)
        assert run._recorded(path, case) == recorded


def test_the_step_of_a_student_learns(monkeypatch):
    monkeypatch.setitem(gpu_step.SHAPES, "Llama-3.2-1B", Shape(32, 4, 2, 8, 97))
    monkeypatch.setattr(gpu_step, "TOKENS", 12)
    job = gpu_step.student_step()
    first, *_ = job.run()
    for _ in range(3):
        last, *_ = job.run()
    assert last < first
