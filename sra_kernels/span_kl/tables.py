"""Which teacher entry goes with each student entry: the ids of a vocabulary as a GPU kernel reads
them.

A row is walked from end to end, so that neighbouring threads read and write neighbours; only the
teacher's shared entries are gathered.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from sra_kernels.span_kl.portable import check_ids, long

Tables = tuple[Tensor | None, Tensor | None]

# A training run has one vocabulary; the rest is for evaluation beside it.
REMEMBERED = 8
PADDING = 16
_known: OrderedDict[object, tuple[Tables, object]] = OrderedDict()
_lock = threading.Lock()


def tables(
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    student_entries: int,
    teacher_entries: int,
) -> Tables:
    """(partner [Vs] int32: the teacher's entry or -1, shared [Vt] uint8: whether it has a partner).

    `partner` is filled with -1 to a multiple of PADDING.

    Ids that are None mean that the columns of that side are the shared entries, in their order;
    partner is None where the columns of both are, and shared where all of the teacher's have one.
    The tables of constant ids are made, and the ids checked, once.
    """
    given = [x for x in (student_ids, teacher_ids) if x is not None]
    if not given:
        return None, None
    device = given[0].device
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a replay needs tables that live as long
            return _made(student_ids, teacher_ids, student_entries, teacher_entries)
        stream = torch.cuda.current_stream(device).cuda_stream
    if any(x.is_inference() for x in given):  # these do not tell when they were changed
        return _made(student_ids, teacher_ids, student_entries, teacher_entries)
    key = (
        _identity(student_ids), _identity(teacher_ids), student_entries, teacher_entries, device,
        stream,
    )  # fmt: skip
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key][0]
    made = _made(student_ids, teacher_ids, student_entries, teacher_entries)
    with _lock:
        # The ids are kept too: their memory cannot become that of others while the key is known.
        _known[key] = made, given
        while len(_known) > REMEMBERED:
            _known.popitem(last=False)
    return made


def _identity(ids: Tensor | None) -> object:
    return None if ids is None else (ids.data_ptr(), ids.shape, ids.stride(), ids._version)


def _made(
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    student_entries: int,
    teacher_entries: int,
) -> Tables:
    check_ids(student_ids, student_entries, "student")
    check_ids(teacher_ids, teacher_entries, "teacher")
    student_ids, teacher_ids = long(student_ids), long(teacher_ids)
    partner = shared = None
    if teacher_ids is not None:
        partner = teacher_ids.to(torch.int32)
        shared = partner.new_zeros(teacher_entries, dtype=torch.uint8)
        shared.index_fill_(0, teacher_ids, 1)
    if partner is None:
        assert student_ids is not None
        partner = torch.arange(len(student_ids), dtype=torch.int32, device=student_ids.device)
    whole = partner.new_full((-(-student_entries // PADDING) * PADDING,), -1)
    if student_ids is None:
        whole[: len(partner)] = partner
    else:
        whole.index_copy_(0, student_ids, partner)
    return whole, shared
