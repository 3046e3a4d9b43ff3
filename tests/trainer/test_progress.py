"""What is shown of a run while it goes on: the bar, its speed and its memory."""

from __future__ import annotations

import time

import pytest
import torch

from sra.progress import LiveTerms, Speed, peak_gib
from tests import tiny
from tests.trainer.cases import trainer


def test_the_speed_is_of_real_tokens_and_of_training(monkeypatch):
    clock = iter([0.0, 10.0, 15.0, 25.0])  # made, pause, resume, read
    monkeypatch.setattr("sra.progress.time.perf_counter", lambda: next(clock))
    batch = tiny.collator()(tiny.ROWS)
    free = {"input_ids": torch.ones(1, 11)}
    assert (batch["attention_mask"] == 0).any()
    speed = Speed()
    speed.add(batch)
    speed.add(free)
    with speed.paused():
        pass
    assert speed.read() == pytest.approx((int(batch["attention_mask"].sum()) + 11) / 20)


def test_evaluations_are_left_out_of_the_speed(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=1)
    begun, counted = [], []
    read = Speed.read

    def evaluate(**options):
        begun.append(run._speed.since)
        time.sleep(0.2)
        return {}

    monkeypatch.setattr(run, "evaluate", evaluate)
    monkeypatch.setattr(Speed, "read", lambda own: counted.append(own.since) or read(own))
    run.train()
    assert counted[0] >= begun[0] + 0.2


def test_memory_is_the_gpu_s_if_it_is_used(monkeypatch):
    own = peak_gib()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert peak_gib() == pytest.approx(own, rel=0.1)  # there, and never touched
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for used, want in ((0, pytest.approx(own, rel=0.1)), (3 << 30, 3)):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda used=used: used)
        assert peak_gib() == want


def test_the_bar_shows_the_terms(tmp_path, capsys):
    run = trainer(tmp_path, disable_tqdm=False, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert any(isinstance(c, LiveTerms) for c in run.callback_handler.callbacks)
    run.train()
    shown = capsys.readouterr().err
    for name in ("loss=", "ce=", "cosine=", "geometry=", "logit=", "bpb=", "agree=", "tok/s="):
        assert name in shown


def test_no_bar_where_none_is_wanted(tmp_path, capsys):
    run = trainer(tmp_path, disable_tqdm=True, max_steps=1)
    assert not any(isinstance(c, LiveTerms) for c in run.callback_handler.callbacks)
    run.train()
    assert "loss=" not in capsys.readouterr().err
