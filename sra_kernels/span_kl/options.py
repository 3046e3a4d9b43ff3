"""The options that span_kl and linear_span_kl share: their types and their checks."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from sra_kernels import check

Direction: TypeAlias = Literal["forward", "reverse", "jsd"]
Outside: TypeAlias = Literal["renormalise", "weight", "bucket"]
Vocab: TypeAlias = tuple[Tensor, Tensor]


def validate(
    temperature: float,
    direction: str,
    beta: float | None,
    outside: str,
    vocab: Vocab | None,
    student: Tensor,
    entries: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None]:
    """Checks everything but the ids' contents, and gives (student_ids, teacher_ids)."""
    if isinstance(temperature, Tensor) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, not {temperature!r}.")
    if direction not in ("forward", "reverse", "jsd"):
        raise ValueError(f"direction must be 'forward', 'reverse' or 'jsd', not {direction!r}.")
    if direction == "jsd" and (beta is None or not 0 < beta < 1):
        raise ValueError(
            f"direction='jsd' needs beta between 0 and 1 (the teacher's share of the mixture), not "
            f"{beta!r}. Its ends are the directions 'forward' and 'reverse'."
        )
    if direction != "jsd" and beta is not None:
        raise ValueError(f"beta belongs to direction='jsd'; with {direction!r} leave it out.")
    if outside not in ("renormalise", "weight", "bucket"):
        raise ValueError(f"outside must be 'renormalise', 'weight' or 'bucket', not {outside!r}.")
    if vocab is None:
        if entries[0] != entries[1]:
            raise ValueError(
                f"The student has {entries[0]} vocabulary entries and the teacher {entries[1]}, so "
                "they cannot be compared one by one. Pass vocab=(student_ids, teacher_ids), the "
                "entries that both share."
            )
        if entries[0] == 0:
            raise ValueError("The vocabulary is empty (size 0): there is nothing to compare.")
        return None, None
    student_ids, teacher_ids = vocab
    check.integers("vocab[0]", student_ids, (None,))
    check.integers("vocab[1]", teacher_ids, (student_ids.shape[0],))
    check.same_device("vocab[0]", student_ids, "the student", student)
    check.same_device("vocab[1]", teacher_ids, "the student", student)
    shared = student_ids.shape[0]
    if shared == 0:
        raise ValueError(
            "vocab is empty: the two vocabularies share no entry, and there is nothing to compare."
        )
    if outside == "bucket" and direction == "forward" and shared == entries[0] < entries[1]:
        raise ValueError(
            "outside='bucket' with direction='forward' is infinite here: vocab holds every entry "
            "of the student, which has nothing left for the bucket, while the teacher has. Use "
            "outside='weight' or 'renormalise'."
        )
    # vocab may be (ids, ids), but torch.compile refuses an autograd.Function one tensor twice. In
    # the caller's own memory and dtype, by which the tables of the ids are known again.
    return student_ids, teacher_ids.view(-1)
