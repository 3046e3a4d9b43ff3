"""Every example runs as a script, its loss falls, and the student that it saves loads."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny

ROOT = Path(__file__).parents[2]
NEEDS = {
    "plain_loop": [],
    "transformers_trainer": [],
    "accelerate_loop": ["accelerate"],
    "trl_sft": ["trl"],
    "gold": ["trl"],
    "lightning_loop": ["lightning"],
    "peft_lora": ["peft"],
}
LOSS = re.compile(r"^(?:epoch|step) \d+ loss ([\d.]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tiny.write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_it_learns_and_saves(tmp_path, checkpoints, name):
    for library in NEEDS[name]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed: pip install {library}")
    student, teacher = checkpoints
    output = tmp_path / "student"
    options = {
        "--student": student, "--teacher": teacher, "--output": output, "--learning-rate": 0.01,
    }  # fmt: skip
    if name == "gold":  # its loss depends on what it samples; here on the data alone
        options |= {"--on-policy": 0, "--new-tokens": 32}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    command += [str(x) for option in options.items() for x in option]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command,
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    losses = [float(x) for x in LOSS.findall(run.stdout)]
    assert len(losses) == 6, run.stdout[-2000:]  # 3 epochs of 8 rows, 4 a step
    assert losses[-1] < 0.97 * losses[0], losses

    if name == "peft_lora":
        from peft import AutoPeftModelForCausalLM

        assert not (output / "model.safetensors").exists()
        loaded = AutoPeftModelForCausalLM.from_pretrained(output)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(output)
    tokens = AutoTokenizer.from_pretrained(output)("The Nile", return_tensors="pt")
    before = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        logits = [model(input_ids=tokens.input_ids).logits for model in (before, loaded)]
    assert (logits[0] - logits[1]).abs().max() > 0.01  # what is saved has learnt
