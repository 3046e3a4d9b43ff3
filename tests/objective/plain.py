"""The objective of `docs/method.md` the slow, obvious way: float64, one unpadded sample at a time.

Written from the formulas alone and sharing no code with the package: attention from
`output_attentions`, spans from token strings, Python loops over tokens, spans and pairs of spans.
Plain autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def exact_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Textbook attention in the dtype of its inputs: transformers' "eager" rounds to float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is None:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    else:
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", eager_mask)


@dataclass(frozen=True)
class Side:
    """One model on one sample."""

    ids: list[int]
    answer: int
    """Index of the completion's first token."""
    spans: list[tuple[int, int]]
    hidden: Tensor
    """[T, D], after the final norm."""
    mass: Tensor
    """[T], sums to 1."""


def render(tokenizer: Any, prompt: str) -> str:
    if tokenizer.chat_template is None:
        return f"{prompt}\n"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )


def tokenise(tokenizer: Any, text: str) -> tuple[list[int], dict[int, int]]:
    """Ids, and for each byte at which a token ends: the number of tokens before it.

    For byte-level BPE alone, which spells every byte as one character.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens, ends, at = tokenizer.convert_ids_to_tokens(ids), {0: 0}, 0
    for count, token in enumerate(tokens, start=1):
        at += len(token)
        ends[at] = count
    assert at == len(text.encode())
    return ids, ends


def run(model: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden states and masses of one sample."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("exact")
    out = model.base_model(
        input_ids=torch.tensor([ids]),
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    model.set_attn_implementation(usual)
    row = out.attentions[-1][0, :, -1].sum(0).detach()
    return out.hidden_states[-1][0], row / row.sum()


def sample(
    student: Any, teacher: Any, student_tokenizer: Any, teacher_tokenizer: Any, row: Mapping
) -> tuple[Side, Side]:
    length = len(row["completion"].encode())
    ids, ends = [], []
    for tokenizer in (student_tokenizer, teacher_tokenizer):
        prefix = render(tokenizer, row["prompt"])
        tokens, at = tokenise(tokenizer, prefix + row["completion"] + tokenizer.eos_token)
        ids.append(tokens)
        ends.append({byte - len(prefix.encode()): count for byte, count in at.items()})
    shared = [byte for byte in range(length + 1) if byte in ends[0] and byte in ends[1]]
    assert shared[0] == 0, "choose rows whose completion starts a token"
    assert shared[-1] == length
    spans = [[(end[a], end[b]) for a, b in pairwise(shared)] for end in ends]
    with torch.no_grad():
        of_teacher = run(teacher, ids[1])
    return (
        Side(ids[0], ends[0][0], spans[0], *run(student, ids[0])),
        Side(ids[1], ends[1][0], spans[1], *of_teacher),
    )


def shared_ids(
    student_tokenizer: Any, teacher_tokenizer: Any, student_rows: int, teacher_rows: int
) -> tuple[Tensor, Tensor]:
    """Ids of equal raw strings that have a row in their head."""
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    pairs = [
        (ours[token], theirs[token])
        for token in sorted(ours)
        if token in theirs and ours[token] < student_rows and theirs[token] < teacher_rows
    ]
    return torch.tensor([s for s, _ in pairs]), torch.tensor([t for _, t in pairs])


def similarity(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.square().sum().sqrt() * b.square().sum().sqrt())


def centre(side: Side, span: tuple[int, int]) -> Tensor:
    tokens = range(*span)
    whole = torch.stack([side.mass[t] * side.hidden[t] for t in tokens]).sum(0)
    return whole / torch.stack([side.mass[t] for t in tokens]).sum()


def with_the_rest(probabilities: Tensor, ids: Tensor) -> Tensor:
    """The listed classes, and all others as one more."""
    rest = torch.ones_like(probabilities, dtype=torch.bool)
    rest[ids] = False
    return torch.cat([probabilities[ids], probabilities[rest].sum()[None]])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def divergence(
    student: Tensor,
    teacher: Tensor,
    vocabulary: tuple[Tensor, Tensor],
    *,
    temperature: float,
    outside: Literal["renormalise", "weight", "bucket"],
    direction: Literal["forward", "reverse", "jsd"],
    beta: float | None,
) -> Tensor:
    """Of one span, from the logits of both whole heads."""
    s_ids, t_ids = vocabulary
    p_all, q_all = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    mass = p_all[t_ids].sum()
    if outside == "bucket":
        p, q = with_the_rest(p_all, t_ids), with_the_rest(q_all, s_ids)
    else:
        p, q = p_all[t_ids] / mass, q_all[s_ids] / q_all[s_ids].sum()
    if direction == "forward":
        value = kl(p, q)
    elif direction == "reverse":
        value = kl(q, p)
    else:
        assert beta is not None
        middle = beta * p + (1 - beta) * q
        value = beta * kl(p, middle) + (1 - beta) * kl(q, middle)
    return mass * value if outside == "weight" else value


def spellings(student_tokenizer: Any, teacher_tokenizer: Any, rows: int) -> list[list[int]]:
    """The student's tokens for each of `rows` ids of the teacher; [] for control tokens and none.

    For byte-level BPE alone. A shared string is itself, and the end of a text the other's end; a
    text is what the tokenizer makes of it; a part of a character is cut into the longest strings of
    the student's, from the left.
    """
    ours = student_tokenizer.get_vocab()
    end = ours.pop(student_tokenizer.eos_token)
    found: list[list[int]] = [[] for _ in range(rows)]
    controls = {i for i, t in teacher_tokenizer.added_tokens_decoder.items() if t.special}
    for token, i in teacher_tokenizer.get_vocab().items():
        if i >= rows or (token not in ours and i in controls):
            continue
        pieces = [token] if token in ours else []
        text = teacher_tokenizer.convert_tokens_to_string([token])
        if not pieces and "\ufffd" not in text:
            pieces = student_tokenizer.tokenize(text)
        if "".join(pieces) != token:  # some tokenizers lack some bytes
            pieces = longest(token, ours)
        found[i] = [ours[piece] for piece in pieces]
    found[teacher_tokenizer.eos_token_id] = [end]
    return found


def longest(token: str, vocabulary: Mapping[str, int]) -> list[str]:
    pieces = []
    while token:
        sizes = [n for n in range(1, len(token) + 1) if token[:n] in vocabulary]
        if not sizes:
            return []
        pieces.append(token[: max(sizes)])
        token = token[max(sizes) :]
    return pieces


def respelt(
    student: Side,
    teacher: Side,
    student_logits: Tensor,
    teacher_logits: Tensor,
    spelling: list[list[int]],
    temperature: float,
) -> Tensor:
    """Sum over the places of a sample, one entry of the teacher after the other."""
    spans = [*zip(student.spans, teacher.spans, strict=True)]
    places: list[tuple[int, int, list[int]]] = []
    for (a, b), (c, _) in spans:
        whole = spelling[teacher.ids[c]]
        for n in range(min(len(whole), b - a)):
            if student.ids[a + n] != whole[n]:
                break
            places.append((a + n - 1, c - 1, whole[:n]))
    places.append((student.spans[-1][1] - 1, teacher.spans[-1][1] - 1, []))
    total = torch.zeros((), dtype=torch.float64)
    for row, at, said in places:
        chances = (teacher_logits[at] / temperature).softmax(-1).tolist()
        reached, target = 0.0, dict[int, float]()
        for chance, tokens in zip(chances, spelling, strict=True):
            if tokens[: len(said)] == said:
                reached += chance
                if len(tokens) > len(said):
                    target[tokens[len(said)]] = target.get(tokens[len(said)], 0.0) + chance
        p = torch.tensor([*target.values()], dtype=torch.float64)
        q = (student_logits[row] / temperature).softmax(-1)[[*target]]
        total = total + p.sum() / reached * kl(p / p.sum(), q)
    taught = {row for row, _, _ in places}
    for a, b in student.spans:
        for row in {*range(a - 1, b - 1)} - taught:
            total = total - student_logits[row].log_softmax(-1)[student.ids[row + 1]]
    return total


def objective(
    samples: Iterable[tuple[Side, Side]],
    *,
    student_head: Any,
    teacher_head: Any,
    projector: Tensor | None,
    vocabulary: tuple[Tensor, Tensor],
    alpha: float,
    gamma: float,
    power: float,
    temperature: float,
    cosine: float,
    logit: float,
    direction: Literal["forward", "reverse", "jsd"],
    beta: float | None,
    logit_state: Literal["com", "end"],
    outside: Literal["renormalise", "weight", "bucket", "respell"],
    normaliser: Literal["sequences", "spans", "tokens"],
    spelling: list[list[int]] | None = None,
) -> dict[str, Tensor]:
    """The loss of a batch, and its terms before their weights. No projector, no cosine term."""
    samples = list(samples)
    ce = cos = geometry = kls = torch.zeros((), dtype=torch.float64)
    tokens = spans = 0
    for student, teacher in samples:
        predictions = student_head(student.hidden[student.answer - 1 :]).log_softmax(-1)
        for t in range(student.answer, len(student.ids)):
            ce = ce - predictions[t - student.answer, student.ids[t]]
            tokens += 1

        own = [centre(student, span) for span in student.spans]
        other = [centre(teacher, span) for span in teacher.spans]
        salience = torch.stack([teacher.mass[a:b].sum() ** power for a, b in teacher.spans])
        salience = salience / salience.sum()

        if projector is not None:
            for i in range(len(own)):
                cos = cos + salience[i] * (1 - similarity(projector @ own[i], other[i]))

        pairs = [(i, j) for i in range(len(own)) for j in range(len(own)) if i != j]
        total = sum(salience[i] * salience[j] for i, j in pairs)
        for i, j in pairs:
            gap = similarity(own[i], own[j]) - similarity(other[i], other[j])
            geometry = geometry + salience[i] * salience[j] / total * gap**2

        if outside == "respell":
            assert spelling is not None
            with torch.no_grad():
                other = teacher_head(teacher.hidden)
            own = student_head(student.hidden)
            kls = kls + respelt(student, teacher, own, other, spelling, temperature)
            continue
        if logit_state == "end":
            own = [student.hidden[b - 1] for _, b in student.spans]
            other = [teacher.hidden[b - 1] for _, b in teacher.spans]
        with torch.no_grad():
            other = teacher_head(torch.stack(other))
        own = student_head(torch.stack(own))
        for i in range(len(own)):
            kls = kls + divergence(
                own[i], other[i], vocabulary,
                temperature=temperature, outside=outside, direction=direction, beta=beta,
            )  # fmt: skip
            spans += 1
    ce, cos, geometry = ce / tokens, cos / len(samples), geometry / len(samples)
    kls = kls / {"tokens": tokens, "spans": spans, "sequences": len(samples)}[normaliser]
    loss = alpha * ce + (1 - alpha) * (cosine * cos + gamma * geometry + logit * kls)
    return {"loss": loss, "ce": ce, "cosine": cos, "geometry": geometry, "logit": kls}
