"""A teacher with a device and a dtype of its own. One machine without GPUs has one device, so the
other one is a tensor's word for it: see `Elsewhere`."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from sra.model import place_teacher
from tests import tiny
from tests.distributed import pairs


class Moves(TorchFunctionMode):
    """Records to which devices tensors are sent."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and isinstance((*args, None)[1], torch.device):
            self.seen.append((tuple(args[0].shape), args[1].type))
            if args[1].type == "meta":  # stands for the other device, and holds no numbers
                args = (args[0], torch.device("cpu"), *args[2:])
        return function(*args, **(kwargs or {}))


class Elsewhere(torch.nn.Parameter):
    """A parameter that says it is on another device; its numbers are where all are."""

    @property
    def device(self):
        return torch.device("meta")


def test_inputs_go_to_the_teacher_and_its_states_come_back(monkeypatch):
    module = pairs.distiller()
    (teacher,) = module.teachers
    batch = pairs.collator()(tiny.ROWS)
    want = module(**batch).loss
    parameters = teacher.parameters
    told = Elsewhere(next(parameters()).detach(), requires_grad=False)
    monkeypatch.setattr(teacher, "parameters", lambda: iter([told, *list(parameters())[1:]]))
    with Moves() as moves:
        got = module(**batch).loss
    assert torch.equal(got, want)
    (inputs,) = batch["teachers"]
    rows, width = inputs["input_ids"].shape
    there = [move[0] for move in moves.seen if move[1] == "meta"]
    back = [move[0] for move in moves.seen if move[1] == "cpu"]
    states, head = (rows * width, 48), (tiny.TEACHER_ROWS, 48)
    assert there == [(rows, width)] * 2  # ids and mask, nothing else
    assert {states, head} <= {*back}


def test_a_teacher_in_bfloat16_and_a_student_in_float32():
    module = pairs.distiller().float()
    batch = pairs.collator()(tiny.ROWS)
    module.teachers[0].float()
    want = module(**batch)
    module.teachers[0].bfloat16()
    got = module(**batch)
    got.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())
    for name in ("ce", "cosine", "geometry", "logit"):
        torch.testing.assert_close(got[name], want[name], rtol=0.03, atol=0.01)
    torch.testing.assert_close(got.ce, want.ce)


def test_placing_a_teacher():
    """One on the CPU is moved; one that is on another device already stays there."""
    teacher = tiny.teacher_model()
    place_teacher(teacher, torch.device("meta"))
    assert all(p.device.type == "meta" for p in teacher.parameters())
    place_teacher(teacher, torch.device("cpu"))
    assert all(p.device.type == "meta" for p in teacher.parameters())
