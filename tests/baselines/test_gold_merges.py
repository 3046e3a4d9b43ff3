"""GOLD against cases worked by hand, a slow reference, and TRL's own loss."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch

from sra import SharedVocabulary, SpanAligner
from sra.baselines import baseline
from sra.baselines.baseline import Pair, Side
from sra.baselines.gold import GOLDBayesian, GOLDObserved
from sra.model import Head
from sra_kernels import span_kl
from tests import tiny

METHODS = {"observed": GOLDObserved, "bayesian": GOLDBayesian}


def side(logits, ids, spans, first=(0,)):
    """A side whose states are its logits."""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    begins = torch.zeros(len(logits), dtype=torch.bool)
    begins[list(first)] = True
    head = Head(torch.eye(logits.shape[1], dtype=torch.float64))
    return Side(logits, torch.tensor(ids), begins, torch.tensor(spans), head, None)


def shared(student_ids, teacher_ids):
    return SimpleNamespace(
        student_ids=torch.tensor(student_ids), teacher_ids=torch.tensor(teacher_ids)
    )


# --- by hand ---

# Rows 0 and 1 predict the student's tokens 1 and 2, row 0 the teacher's only one.
P1, P2, T1 = [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4], [1 / 4, 3 / 4]
MERGED = {
    "observed": [x * 3 / 4 for x in P1],  # p_2(x_2) = 3/4
    "bayesian": [1 / 4 * x for x in P2],  # p_1(x_1) = 1/4
}


def by_hand():
    student = side(torch.tensor([P1, P2, [1.0, 1, 1]]).log(), [0, 1, 2], [[1, 3]])
    teacher = side(torch.tensor([T1, [1.0, 1]]).log(), [0, 1], [[1, 2]])
    return Pair(student, teacher, torch.tensor([0, 1]), shared([0], [1]))


@pytest.mark.parametrize("merge", METHODS)
def test_the_loss_by_hand(merge):
    """The student's entry 0 is the teacher's 1; entries 1 and 2 face the teacher's 0."""
    s, t = MERGED[merge], T1
    m = 0.5 * (s[0] + t[1])
    jsd = 0.5 * t[1] * math.log(t[1] / m) + 0.5 * s[0] * math.log(s[0] / m)
    ranks = sorted(s[1:], reverse=True)
    l1 = abs(ranks[0] - t[0]) + ranks[1]
    method = METHODS[merge]
    got = method().loss(by_hand(), [])  # one of the teacher's two entries is matched
    assert got.item() == pytest.approx(jsd / 2 + l1 / 2, rel=1e-6)
    got = method(matched_weight=0.9).loss(by_hand(), [])
    assert got.item() == pytest.approx(0.9 * jsd + 0.1 * l1, rel=1e-6)
    got = method(matched_weight=2.0, unmatched_weight=3.0).loss(by_hand(), [])
    assert got.item() == pytest.approx(2 * jsd + 3 * l1, rel=1e-6)


@pytest.mark.parametrize("merge", METHODS)
def test_a_span_that_nothing_predicts_is_left_out(merge):
    """On either side, as where the teacher's tokenizer puts nothing in front of the answer."""
    torch.manual_seed(0)
    student = side(torch.zeros(3, 3), [0, 1, 2], [[1, 2], [2, 3]])
    teacher = side(torch.randn(2, 2), [0, 1], [[0, 1], [1, 2]])
    vocabulary = shared([0], [1])
    method = METHODS[merge]()
    both = method.loss(Pair(student, teacher, torch.tensor([0, 2]), vocabulary), [])
    ours, theirs = (x._replace(spans=x.spans[1:]) for x in (student, teacher))
    assert both == method.loss(Pair(ours, theirs, torch.tensor([0, 1]), vocabulary), [])
    assert both > 0


@pytest.mark.parametrize("merge", METHODS)
def test_one_tokenizer_for_both(merge):
    """Every entry is matched and every span a token: the divergence of our kernel."""
    torch.manual_seed(0)
    spans = [[i, i + 1] for i in range(1, 6)]
    student, teacher = (side(torch.randn(6, 7), [1] * 6, spans) for _ in range(2))
    pair = Pair(student, teacher, torch.tensor([0, 5]), None)
    got = METHODS[merge](beta=0.3, temperature=2.0).loss(pair, [])
    rows = student.hidden[:5], teacher.hidden[:5]
    want = span_kl(*rows, temperature=2.0, direction="jsd", beta=0.3).sum()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_is_inside(beta):
    with pytest.raises(ValueError, match=f"beta = {beta}"):
        GOLDObserved(beta=beta)


# --- against loops ---


def reference(pair, merge, temperature, beta):
    def merged(one, start, end):
        p = [None] * len(one.ids)
        for row in range(start, end):
            scores = (one.head.weight @ one.hidden[row - 1] / temperature).tolist()
            norm = sum(map(math.exp, scores))
            p[row] = [math.exp(x) / norm for x in scores]
        kept = start if merge == "observed" else end - 1
        factor = math.prod(p[k][one.ids[k]] for k in range(start, end) if k != kept)
        return [x * factor for x in p[kept]]

    matched = list(zip(*(x.tolist() for x in pair.vocabulary), strict=True))
    total = 0.0
    for ours, theirs in zip(pair.student.spans.tolist(), pair.teacher.spans.tolist(), strict=True):
        if pair.student.first[ours[0]] or pair.teacher.first[theirs[0]]:
            continue
        s, t = merged(pair.student, *ours), merged(pair.teacher, *theirs)
        weight = len(matched) / len(t)
        for i, j in matched:
            m = beta * t[j] + (1 - beta) * s[i]
            total += weight * beta * t[j] * math.log(t[j] / m)
            total += weight * (1 - beta) * s[i] * math.log(s[i] / m)
        rest = [
            sorted((x for k, x in enumerate(one) if k not in taken), reverse=True)
            for one, taken in zip((s, t), map(set, zip(*matched, strict=True)), strict=True)
        ]
        for one in rest:
            one.extend([0.0] * (max(map(len, rest)) - len(one)))
        total += (1 - weight) * sum(abs(a - b) for a, b in zip(*rest, strict=True))
    return total


def ragged(generator, sequences, entries):
    """One side: sequences of spans of 1 to 4 tokens, some of which nothing predicts."""

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    spans, first, row = [], [], 0
    for count in sequences:
        first.append(row)
        row += draw(0, 3)
        for _ in range(count):
            size = draw(1, 5)
            spans.append([row, row + size])
            row += size
        row += draw(1, 3)
    ids = torch.randint(0, entries, (row,), generator=generator).tolist()
    made = side(torch.randn(row, 9, generator=generator, dtype=torch.float64), ids, spans, first)
    weight = torch.randn(entries, 9, generator=generator, dtype=torch.float64)
    return made._replace(head=Head(weight))


@pytest.mark.parametrize("merge", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_against_loops(merge, seed):
    generator = torch.Generator().manual_seed(seed)
    sequences = [3, 1, 60, 8]
    student, teacher = (ragged(generator, sequences, n) for n in (17, 23))
    ids = torch.randperm(17, generator=generator)[:8], torch.randperm(23, generator=generator)[:8]
    offsets = torch.tensor([0, *sequences]).cumsum(0)
    pair = Pair(student, teacher, offsets, shared(*(x.tolist() for x in ids)))
    got = METHODS[merge](temperature=1.5, beta=0.3).loss(pair, [])
    want = reference(pair._replace(vocabulary=ids), merge, 1.5, 0.3)
    assert got.item() == pytest.approx(want, rel=1e-6)


# --- against TRL ---


def trl_loss(folder, **options):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from trl.experimental.gold import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = GOLDConfig(
        output_dir=str(folder), use_uld_loss=True, use_cpu=True, bf16=False, report_to="none",
        **options,
    )  # fmt: skip
    return ULDLoss(config, tiny.student_tokenizer(), tiny.teacher_tokenizer())


PROMPT = 3  # tokens


def one_row(text):
    """Our pair for one completion behind a prompt, and what TRL's loss is called with.

    What was said is likely: TRL raises probabilities below 1e-8, of which there shall be none.
    """
    from trl.experimental.utils import encode_with_byte_offsets

    tokenizers = tiny.student_tokenizer(), tiny.teacher_tokenizer()
    table = SpanAligner(*tokenizers)(text)
    sides, inputs = [], []
    for tokenizer, own, spans, entries in zip(
        tokenizers, (table.student_ids, table.teacher_ids), (table.student, table.teacher),
        (tiny.STUDENT_ROWS, tiny.TEACHER_ROWS), strict=True,
    ):  # fmt: skip
        ((encoded, at),) = encode_with_byte_offsets(
            tokenizer.backend_tokenizer, [text], add_special_tokens=False
        )
        assert encoded == own.tolist()
        ids = torch.tensor([*[5] * PROMPT, *encoded, tokenizer.eos_token_id])
        logits = torch.randn(len(ids), entries, dtype=torch.float64) / 2
        logits[torch.arange(len(ids) - 1), ids[1:]] += 7
        logits.requires_grad_()
        labels = ids.clone()
        labels[:PROMPT] = -100
        offsets = torch.tensor([*[(0, 0)] * PROMPT, *at, (at[-1][1], at[-1][1])])
        sides.append(
            side(logits, ids.tolist(), (torch.tensor(spans) + PROMPT).tolist())._replace(
                hidden=logits
            )
        )
        inputs.append([x[None] for x in (logits, labels, ids, offsets)])
    vocabulary = SharedVocabulary(
        *tokenizers, match="raw", student_rows=tiny.STUDENT_ROWS, teacher_rows=tiny.TEACHER_ROWS
    )
    pair = Pair(*sides, torch.tensor([0, len(table.student)]), vocabulary)
    return pair, [x for both in zip(*inputs, strict=True) for x in both]


@pytest.mark.parametrize("weights", [None, (0.3, 1.7)])
@pytest.mark.parametrize("merge", METHODS)
def test_the_loss_of_trl(tmp_path, merge, weights):
    """Hybrid loss, vocabularies matched by string, one row at a time, byte-level tokenizers.

    TRL divides by the spans of the row. Its observed mode gets logits moved by one position, so
    that what it reads at a token is what predicts the token. Gradients are compared, too.
    """
    torch.manual_seed(0)
    matched, unmatched = weights or (None, None)
    theirs = trl_loss(
        tmp_path, uld_token_merge_strategy=merge, uld_use_hybrid_loss=True, beta=0.3,
        uld_student_temperature=1.2, uld_teacher_temperature=1.2,
        uld_hybrid_matched_weight=matched, uld_hybrid_unmatched_weight=unmatched,
    )  # fmt: skip
    ours = METHODS[merge](
        beta=0.3, temperature=1.2, matched_weight=matched, unmatched_weight=unmatched
    )
    merged = 0
    for row in tiny.ROWS:
        pair, inputs = one_row(row["completion"])
        merged += int((pair.student.spans.diff(dim=1) > 1).sum())
        logits = pair.student.hidden
        got = ours.loss(pair, [])
        if merge == "observed":
            inputs[:2] = (x.roll(1, dims=1) for x in inputs[:2])
        want = theirs(*inputs) * len(pair.student.spans)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
        (gradient,) = torch.autograd.grad(got, logits)
        (wanted,) = torch.autograd.grad(want, logits)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)
    assert merged > 10


def test_observed_probabilities_of_trl_are_late(tmp_path):
    """What the class leaves out; if this fails, TRL has mended it."""
    torch.manual_seed(0)
    theirs = trl_loss(tmp_path, uld_token_merge_strategy="observed", uld_use_hybrid_loss=True)
    pair, inputs = one_row(tiny.ROWS[0]["completion"])
    got = GOLDObserved().loss(pair, []) / len(pair.student.spans)
    assert not torch.isclose(got, theirs(*inputs), rtol=0.1)


def test_uld_of_trl(tmp_path):
    """Without byte offsets and matched entries, in the mode that shifts: positions by number."""
    torch.manual_seed(0)
    theirs = trl_loss(tmp_path, uld_token_merge_strategy="bayesian", use_extended_uld=False)
    for row in tiny.ROWS:
        pair, inputs = one_row(row["completion"])
        count = min(int(x.spans.diff(dim=1).sum()) for x in (pair.student, pair.teacher))
        want = theirs(*inputs) * count
        torch.testing.assert_close(baseline("uld").loss(pair, []), want, rtol=1e-6, atol=1e-9)
