"""MinED: distributions moved by minimum edit distance (FuseLLM, arXiv 2401.10491, section 3.3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sra.baselines.baseline import Baseline, Pair, answers
from sra.token_bytes import ByteTokenizer, byte_tokenizer
from sra.vocabulary import SharedVocabulary

ROWS = 64  # whose logits stand side by side: 64 * 150,000 fp32 is 38 MB
CELLS = 1 << 21  # of the tables of edit distances that are filled at once
UNKNOWN, NOTHING = -2, -1


class EditVocabulary(SharedVocabulary):
    """Adds, to the entries that two vocabularies share, the nearest one for each other.

    The nearest entry of the student is the one with the fewest inserted, deleted and replaced
    bytes; of several, the one nearest in length, the shorter one first, with the lowest id. Control
    tokens and ids without a token are nobody's nearest, and have none unless they are shared.

    The search is exact, and done when an entry is first asked for, 10 ms each: a teacher's most
    likely entries are a small part of its vocabulary, and the whole of 150,000 * 50,000 takes 20
    minutes. Entries of other lengths are at least as far away as their length differs, so the
    search begins at the same length and ends where a difference reaches the best distance.

    Attributes:
        student_bytes, teacher_bytes: what each id spells; a word start is a space on both sides.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        student_rows: int | None = None,
        **options: Any,
    ) -> None:
        student, teacher = byte_tokenizer(student_tokenizer), byte_tokenizer(teacher_tokenizer)
        super().__init__(student_tokenizer, teacher_tokenizer, student_rows=student_rows, **options)
        self.student_bytes, self.teacher_bytes = spellings(student), spellings(teacher)
        by_length = defaultdict(list)
        for i, piece in enumerate(self.student_bytes[:student_rows]):
            if piece and i not in student.special_ids:
                by_length[len(piece)].append(i)
        self._by_length = {
            length: (np.array(ids), _table([self.student_bytes[i] for i in ids]))
            for length, ids in by_length.items()
        }
        size = max(len(self.teacher_bytes), int(self.teacher_ids.max()) + 1)
        self._nearest = torch.full((size,), UNKNOWN)
        self._nearest[[i for i, piece in enumerate(self.teacher_bytes) if not piece]] = NOTHING
        self._nearest[list(teacher.special_ids)] = NOTHING
        self._nearest[self.teacher_ids] = self.student_ids

    def nearest(self, teacher_ids: Tensor) -> Tensor:
        """The student's entry for each of the teacher's, -1 where there is none."""
        ids = teacher_ids.cpu()
        known = ids < len(self._nearest)  # heads have more rows than there are tokens
        ids = torch.where(known, ids, 0)
        new = ids[known].unique()
        self._search(new[self._nearest[new] == UNKNOWN].tolist())
        return torch.where(known, self._nearest[ids], NOTHING).to(teacher_ids.device)

    def _search(self, ids: list[int]) -> None:
        groups = defaultdict(list)
        for i in ids:
            groups[len(self.teacher_bytes[i])].append(i)
        for size, group in groups.items():
            pieces = _table([self.teacher_bytes[i] for i in group])
            best, found = np.full(len(group), np.iinfo(np.int16).max), np.full(len(group), NOTHING)
            for length in sorted(self._by_length, key=lambda n: (abs(n - size), n)):
                open_ = np.flatnonzero(best > abs(length - size))
                if not len(open_):
                    break
                theirs, table = self._by_length[length]
                for part in np.array_split(open_, -(-len(open_) * table.size // CELLS)):
                    distance = edit_distances(pieces[part], table)
                    first = distance.argmin(1)
                    least = distance[np.arange(len(part)), first]
                    closer = least < best[part]
                    best[part[closer]] = least[closer]
                    found[part[closer]] = theirs[first[closer]]
            self._nearest[group] = torch.from_numpy(found)


def spellings(tokenizer: ByteTokenizer) -> list[bytes]:
    """The bytes of each id; a WordPiece entry that begins a word has a space in front."""
    continuation = getattr(tokenizer.backend.model, "continuing_subword_prefix", None)
    table = list(tokenizer.token_bytes)
    if continuation:
        for piece, i in tokenizer.backend.get_vocab(with_added_tokens=True).items():
            if i not in tokenizer.special_ids and not piece.startswith(continuation):
                table[i] = b" " + table[i]
    return table


def _table(pieces: list[bytes]) -> np.ndarray:
    """uint8 ``[N, L]``, of pieces of one length."""
    return np.frombuffer(b"".join(pieces), np.uint8).reshape(len(pieces), len(pieces[0]))


def edit_distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """int16 ``[M, N]``: Levenshtein's, of each row of ``[M, L]`` to each of ``[N, K]``."""
    # Axis 0: the prefixes of theirs. A run of insertions is a minimum over shorter prefixes.
    steps = np.arange(theirs.shape[1] + 1, dtype=np.int16)[:, None, None]
    row = np.broadcast_to(steps, (len(steps), len(ours), len(theirs)))
    for byte in ours.T[..., None]:
        new = row + np.int16(1)
        np.minimum(new[1:], row[:-1] + (theirs.T[:, None] != byte), out=new[1:])
        row = np.minimum.accumulate(new - steps, axis=0) + steps
    return row[-1]


def token_distances(ours: list[bytes], theirs: list[bytes]) -> np.ndarray:
    """int16 ``[n, m]``: of each of our tokens to each of theirs."""
    tables = []
    for tokens in (ours, theirs):
        groups = defaultdict(list)
        for piece in set(tokens):
            groups[len(piece)].append(piece)
        at = {piece: k for k, piece in enumerate(x for group in groups.values() for x in group)}
        tables.append(([_table(x) for x in groups.values()], [at[piece] for piece in tokens]))
    (left, rows), (right, columns) = tables
    distances = np.block([[edit_distances(a, b) for b in right] for a in left])
    return distances[np.ix_(rows, columns)]


def warped(cost: np.ndarray) -> np.ndarray:
    """int64 ``[P, 2]``: the cheapest path of dynamic time warping, backwards. Of paths that cost
    the same, the one whose last steps advance both sides, or else the first side alone."""
    n, m = cost.shape
    total = np.full((n + 1, m + 1), 1 << 40)
    total[0, 0] = 0
    for i, row in enumerate(cost.astype(np.int64)):
        # A run of steps along a row costs a difference of its running sum.
        along = row.cumsum()
        entered = np.minimum(total[i, :-1], total[i, 1:]) - (along - row)
        total[i + 1, 1:] = along + np.minimum.accumulate(entered)
    path, (i, j) = [], (n, m)
    while i and j:
        path.append((i - 1, j - 1))
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=total.__getitem__)
    return np.array(path)


@dataclass(frozen=True)
class MinED(Baseline):
    """Tokens are paired by dynamic time warping, entries by edit distance.

    L = sum over the student's tokens of KL(q || p_student), both at `temperature`. Where a token
    and one of the teacher's are each other's only partner on the path, and the teacher's token
    becomes the student's under `EditVocabulary`, q is the teacher's distribution: its `top_k`
    entries, as the paper stores them, moved to the student's nearest ones and renormalised.
    Everywhere else q is one-hot, so that the term is the token's negative log-likelihood.

    Public code compares strings, with word-start marks replaced for the tokenizer classes that it
    knows; here bytes are compared. It keeps one of several entries that become the same one; here
    their probabilities are added. It asks only that the student's token has one partner. It holds
    one-hot rows as wide as the vocabulary; here `top_k` numbers a token. It pairs the tokens that
    are read and compares what follows them; here, what predicts them, where the paired tokens say
    that both were asked the same.
    """

    temperature: float = 1.0
    top_k: int = 10
    name: ClassVar[str] = "mined"
    vocabulary: ClassVar[Any] = EditVocabulary

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: at least one entry is moved.")

    def loss(self, pair: Pair, projections: Sequence[Tensor]) -> Tensor:
        rows, partners = partnered(pair)
        total = pair.student.hidden.new_zeros((), dtype=torch.float32)
        targets = self._targets(pair, rows, partners)
        parts = (x.split(ROWS) for x in (pair.student.hidden[rows - 1], *targets))
        for states, entries, mass in zip(*parts, strict=True):

            def cross_entropy(states: Tensor, entries: Tensor, mass: Tensor) -> Tensor:
                logits = pair.student.head.logits(states) / self.temperature
                return -(mass * logits.log_softmax(dim=-1).gather(1, entries)).sum()

            same = entries[:, :, None] == entries[:, None, :]
            entropy = -torch.xlogy(mass, (same * mass[:, None, :]).sum(2)).sum()
            ce: Tensor = checkpoint(cross_entropy, states, entries, mass, use_reentrant=False)
            total = total + ce - entropy
        return total

    @torch.no_grad()
    def _targets(self, pair: Pair, rows: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
        """Entries of the student and their probabilities, each ``[A, k]``; an entry may recur."""
        tokens, teacher = pair.student.ids[rows], pair.teacher
        k = min(self.top_k, len(teacher.head.weight))
        entries = tokens[:, None].repeat(1, k)
        dtype = torch.promote_types(teacher.head.weight.dtype, torch.float32)
        mass = torch.zeros(entries.shape, dtype=dtype, device=tokens.device)
        mass[:, 0] = 1
        for part in (partners >= 0).nonzero().flatten().split(ROWS):
            logits, found = teacher.head.logits(teacher.hidden[partners[part] - 1]).topk(k)
            moved, label = found, teacher.ids[partners[part]]
            if pair.vocabulary is not None:
                moved, label = pair.vocabulary.nearest(found), pair.vocabulary.nearest(label)
            logits = (logits / self.temperature).masked_fill(moved < 0, -torch.inf)
            keep = (label == tokens[part]) & (moved >= 0).any(1)
            mass[part[keep]] = logits[keep].softmax(dim=-1)
            entries[part[keep]] = moved[keep].clamp(min=0)
        return entries, mass


def partnered(pair: Pair) -> tuple[Tensor, Tensor]:
    """Rows of the student's tokens, and for each the row of its one partner, -1 if it has none."""
    ours, theirs = (answers(side, pair.offsets) for side in (pair.student, pair.teacher))
    partners = np.full(len(ours.rows), -1)
    ids = [s.ids[x.rows].cpu().numpy() for s, x in ((pair.student, ours), (pair.teacher, theirs))]
    sequences = len(pair.offsets) - 1
    ends = [torch.bincount(x.sequence, minlength=sequences).cumsum(0) for x in (ours, theirs)]
    first, first_other = 0, 0
    for last, last_other in zip(*(end.tolist() for end in ends), strict=True):
        own, other = ids[0][first:last], ids[1][first_other:last_other]
        if len(own) and len(other):
            path = warped(_cost(own, other, pair.vocabulary))
            alone = np.bincount(path[:, 0]) == 1, np.bincount(path[:, 1]) == 1
            path = path[alone[0][path[:, 0]] & alone[1][path[:, 1]]]
            partners[first + path[:, 0]] = first_other + path[:, 1]
        first, first_other = last, last_other
    at = torch.from_numpy(partners).to(ours.rows.device)
    rows = torch.cat([theirs.rows, theirs.rows.new_tensor([-1])])  # which -1 finds
    return ours.rows, rows[at]


def _cost(own: np.ndarray, other: np.ndarray, vocabulary: EditVocabulary | None) -> np.ndarray:
    if vocabulary is None:  # one tokenizer: a token is the same or not
        return own[:, None] != other[None, :]
    return token_distances(
        [vocabulary.student_bytes[i] for i in own], [vocabulary.teacher_bytes[i] for i in other]
    )
