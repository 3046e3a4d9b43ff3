"""The whole SRA loss and a training step: providers compute what they say. Speed is not judged.

torch.compile takes half a minute on the whole loss: the suite verifies it, where it times it.
"""

import dataclasses

import pytest
import torch

from benchmarks import sra_loss, sra_loss_rivals, training_step
from benchmarks.measure import Refused, verify
from benchmarks.registry import Absent, Job
from sra_kernels import use_backend
from sra_kernels.backend import current

LOSS, STEP = sra_loss.BENCHMARK, training_step.BENCHMARK


@pytest.mark.parametrize("case", LOSS.small, ids=lambda case: case.dtype)
@pytest.mark.parametrize("provider", ["ours", "authors' recipe", "eager"])
def test_the_whole_loss_is_right(provider, case):
    x = LOSS.inputs(case)
    verify(LOSS.providers[provider](x), LOSS.exact(x), LOSS.tolerance(case))


def in_float64(x):
    """The same inputs, their gradients' leaves made anew."""
    sides = [
        dataclasses.replace(
            side,
            **{
                name: getattr(side, name).detach().double()
                for name in ("hidden", "query", "key", "head")
            },
        )
        for side in (x.student, x.teacher)
    ]
    wide = sra_loss.Inputs(*sides, x.projector.detach().double(), x.offsets)
    for leaf in wide.leaves:
        leaf.requires_grad_()
    return wide


def test_the_exact_loss_is_the_objective_in_float64():
    x = in_float64(LOSS.inputs(LOSS.small[0]))
    with use_backend("reference"):
        verify(LOSS.providers["ours"](x), LOSS.exact(x), 1e-9)


def test_the_authors_pads_and_ours_does_not():
    """More than twice as many padded spans as real ones, at the suite's batch of 4."""
    case = LOSS.cases[0]
    index, mask = sra_loss_rivals._padded_index(
        [torch.tensor([[3, 4], [4, 6]]), torch.tensor([[1, 2]])]
    )
    assert index.tolist() == [[[3, 0], [4, 5]], [[1, 0], [0, 0]]]
    assert mask.sum() == 4
    counts = sra_loss.span_counts(case.batch)
    assert max(counts) * case.batch > 2 * case.spans


@pytest.mark.models
def test_a_step_and_its_loss_part_run():
    loss_part, whole = STEP.small
    try:
        x = STEP.inputs(loss_part)
    except RuntimeError as reason:  # models that are neither in the cache nor to be fetched
        pytest.skip(str(reason))
    head = x.student.get_output_embeddings().weight.shape
    for part in (loss_part.case, whole.case):
        data = dataclasses.replace(x, part=part)
        for name, prepare in {**STEP.bounds, **STEP.providers}.items():
            try:
                job = prepare(data)
            except Absent:
                assert name == "GOLD"  # TRL is optional
                continue
            verify(job, None, 0)
            assert head in [result.shape for result in job.run()]
            job.reset()


def test_a_step_that_is_not_its_reference_is_refused():
    right = Job(lambda: [torch.ones(3)])
    wrong = Job(lambda: [torch.ones(3) * (1 if current() == "reference" else 1.02)])
    assert training_step._as_reference(right) is right
    with pytest.raises(Refused, match="error"):
        training_step._as_reference(wrong)
