"""What a training step will need: bytes and seconds, predicted before any weight is loaded.

The models' work is counted by `sra.doctor.workload`. Seconds come from rates that are measured on
this machine, with products of the very shapes that the step has.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sra.chunks import FEW
from sra.chunks import ROWS as CHUNK
from sra.doctor.workload import Shape, Work, count_parameters, trace
from sra.main_memory import available_bytes
from sra.objective import DEFAULT, RECIPES, Objective
from sra_kernels import explain, linear_span_kl

GEMM_BUDGET = 2.0  # seconds that measuring the products may take
LARGEST_PRODUCT = 4e9  # flops of a measured product; of a larger one a part is measured
# Bytes of state for each parameter; bytes that a step reads and writes for it.
OPTIMISERS = {"adamw": (8, 28), "adamw_8bit": (2, 16), "sgd": (0, 12)}
CLIPPING = 12  # bytes for each gradient: read for the norm, then scaled in place


@dataclass(frozen=True)
class Machine:
    """Rates of a machine: `measure` takes them, or give your own.

    flops: of matrix products a second, for shapes that were not measured.
    bandwidth: bytes a second that operations in between read and write, allocation included.
    streaming: the same in place, in memory that is there.
    exponentials: a second.
    overhead: seconds that an operation takes beside its work.
    products: seconds of each measured product.
    """

    flops: float
    bandwidth: float
    streaming: float
    exponentials: float
    overhead: float
    products: dict[Shape, float] = field(default_factory=dict, repr=False)

    @classmethod
    def unmeasured(cls) -> Machine:
        """For predictions of memory alone: every rate is 1."""
        return cls(1.0, 1.0, 1.0, 1.0, 1.0)

    def gemm(self, shape: Shape) -> float:
        m, n, k = shape
        return self.products.get(shape, 2.0 * m * n * k / self.flops)

    def seconds(self, work: Work) -> float:
        products = sum(self.gemm(shape) * count for shape, count in work.gemms.items())
        return products + work.moved / self.bandwidth + work.operations * self.overhead


def measure(
    shapes: Iterable[Shape] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rows: int = 1024,
    clock: Callable[[], float] = time.perf_counter,
) -> Machine:
    """Time this machine, about `GEMM_BUDGET` seconds and a little more.

    Args:
        shapes: products to time, the most important first; what is left when the budget is spent
            gets the mean rate.
        rows: of the tensors of the other operations, as many as a batch has tokens.
        clock: what tells seconds; `time.process_time` leaves out what other processes take.
    """

    def once(f: Callable[[], Any]) -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        f()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    def best(f: Callable[[], Any], times: int = 3) -> float:
        f()
        return sorted(once(f) for _ in range(times))[times // 2]

    products: dict[Shape, float] = {}
    done = spent = 0.0
    for shape in shapes or [(rows, 1024, 1024)]:
        if spent > GEMM_BUDGET:
            break
        m, n, k = shape
        # Cut along the longer side: a product of few rows is slower than many of its size.
        share = min(1.0, LARGEST_PRODUCT / (2.0 * m * n * k))
        rows_used, columns = (round(m * share), n) if m > n else (m, round(n * share))
        rows_used, columns = max(rows_used, 1), max(columns, 1)
        a = torch.ones(rows_used, k, dtype=dtype, device=device)
        b = torch.ones(columns, k, dtype=dtype, device=device).T
        start = time.perf_counter()
        took = best(partial(torch.mm, a, b)) * (m * n) / (rows_used * columns)
        spent += time.perf_counter() - start
        products[shape] = took
        done += 2.0 * m * n * k / took
    x = torch.ones(min(rows, 8192), 1024, device=device)
    y = torch.ones(1 << 24, device=device)
    # Kept, so that each is written to memory that was not used before, as activations are. On two
    # cores of an EPYC that is 15 GB/s; into the memory of a tensor just freed, 214.
    kept: list[torch.Tensor] = []
    tiny = torch.ones(1, device=device)
    e = torch.ones(1 << 20, device=device)
    return Machine(
        flops=done / len(products),
        bandwidth=3 * x.nbytes / best(lambda: kept.append(x * x), 9),
        streaming=2 * y.nbytes / best(lambda: y.mul_(1.0)),
        exponentials=e.numel() / best(lambda: torch.exp(e, out=e)),
        overhead=best(lambda: [tiny + tiny for _ in range(200)]) / 200,
        products=products,
    )


@dataclass(frozen=True)
class Plan:
    """The prediction for one training step.

    memory: bytes by part at the moment of the step that needs most; `moment` names it.
    seconds: by part; empty without a machine.
    student_parameters, teacher_parameters: how many.
    """

    memory: dict[str, int]
    moment: str
    seconds: dict[str, float]
    student_parameters: int
    teacher_parameters: int

    @property
    def peak(self) -> int:
        """Bytes, beside what the process takes before a model is loaded."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def predict(
    student_config: Any,
    teacher_config: Any,
    *,
    batch_size: int,
    student_tokens: int,
    teacher_tokens: int,
    spans: float,
    labels: float | None = None,
    shared: int | None = None,
    objective: Objective = RECIPES[DEFAULT],
    dtype: torch.dtype = torch.float32,
    optimiser: str = "adamw",
    cached: bool = False,
    gradient_checkpointing: bool = False,
    machine: Machine | None = None,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Plan:
    """Predict one step of `SpanDistiller` and its optimiser.

    Args:
        batch_size: sequences; the next four are of one sequence.
        student_tokens, teacher_tokens: length with padding.
        spans, labels: their number (labels None: every token).
        shared: entries of the shared vocabulary; None if there is one vocabulary.
        dtype: of matrix products and of the teacher. The student's weights are float32.
        optimiser: "adamw", "adamw_8bit" or "sgd".
        cached: the teacher's states are read from a cache; its head stays in memory.
        machine: rates, or None to measure them now, on this `device`, by this `clock`.

    Raises:
        ValueError: an unknown optimiser, or a model that cannot be run without data.
    """
    if optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser = {optimiser!r}: choose one of {', '.join(OPTIMISERS)}.")
    state, optimiser_moved = OPTIMISERS[optimiser]
    student = count_parameters(student_config)
    ours = student_config.get_text_config()
    student_trace = trace(student_config, batch_size=batch_size, tokens=student_tokens, dtype=dtype)
    rows = round(batch_size * spans)
    labelled = round(batch_size * (student_tokens if labels is None else labels))
    distils = objective.needs_teacher
    head = Heads(objective, ours, None, labelled, rows, shared, dtype)
    teacher = projector = 0
    teacher_work = None
    teacher_bytes = teacher_width = 0.0
    if distils:
        theirs = teacher_config.get_text_config()
        teacher = count_parameters(teacher_config)
        head = Heads(objective, ours, theirs, labelled, rows, shared, dtype)
        projector = ours.hidden_size * theirs.hidden_size if objective.cosine else 0
        in_memory = theirs.vocab_size * theirs.hidden_size if cached else teacher
        teacher_bytes = in_memory * dtype.itemsize
        if not cached:
            found = trace(
                teacher_config,
                batch_size=batch_size,
                tokens=teacher_tokens,
                dtype=dtype,
                backward=False,
            )
            teacher_work, teacher_width = found.forward, found.width
    trained = student + projector

    saved = student_trace.saved
    if gradient_checkpointing:
        borders = ours.num_hidden_layers * batch_size * student_tokens * ours.hidden_size
        saved = borders * dtype.itemsize + student_trace.layer_saved
    always = {
        "student": 4 * trained,
        "teacher": teacher_bytes,
        "optimiser": state * trained,
    }
    moments: dict[str, dict[str, float]] = {
        "the teacher's forward": {"activations": saved + teacher_width},
        "the loss": {"activations": saved, "heads": head.forward},
        "the backward of the heads": {"activations": saved, "heads": head.backward},
        "the end of the backward": {"gradients": 4 * trained},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts = {**always, **moments[moment]}

    forward, backward = student_trace.forward, student_trace.backward
    if machine is None:
        works = [forward, backward, head.work, *([teacher_work] if teacher_work else [])]
        machine = measure(
            _heaviest(works),
            dtype=dtype,
            device=device,
            rows=batch_size * student_tokens,
            clock=clock,
        )
    seconds = {
        "student forward": machine.seconds(forward) * (2 if gradient_checkpointing else 1),
        "student backward": machine.seconds(backward),
        "teacher forward": machine.seconds(teacher_work) if teacher_work else 0.0,
        "heads": machine.seconds(head.work) + head.exponentials / machine.exponentials,
        "optimiser": (optimiser_moved + CLIPPING) * trained / machine.streaming,
    }
    return Plan(
        {name: int(size) for name, size in parts.items() if size},
        moment,
        {name: time for name, time in seconds.items() if time},
        student,
        teacher,
    )


def _heaviest(works: Iterable[Work]) -> list[Shape]:
    total: Counter[Shape] = Counter()
    for work in works:
        for shape, count in work.gemms.items():
            total[shape] += count * shape[0] * shape[1] * shape[2]
    return [shape for shape, _ in total.most_common()]


class Heads:
    """Bytes and work of the cross-entropy and of the span terms.

    forward, backward: bytes that they need at most in the forward, where gradients are formed, and
        in the backward, where these wait to be put in place.
    """

    def __init__(
        self,
        objective: Objective,
        ours: Any,
        theirs: Any | None,
        labels: int,
        spans: int,
        shared: int | None,
        dtype: torch.dtype,
    ) -> None:
        rows, width = ours.vocab_size, ours.hidden_size
        gradient = rows * width * 4  # of the head
        together = theirs is not None and objective.shares_logits and spans > 0
        gemms: Counter[Shape] = Counter()
        self.forward = self.backward = moved = 0.0
        self.exponentials = 2.0 * labels * rows
        alone = 0.0  # of cross-entropy, which is formed last, in the forward
        if not together:
            moved = 40.0 * labels * rows
            gemms += Counter([(labels, rows, width), (labels, width, rows), (rows, width, labels)])
            if labels <= FEW:
                # log_softmax is kept; in the backward, the gradients of it and of the logits join.
                self.backward = 12.0 * labels * rows + gradient
            else:
                # Of a chunk, the logits as they are multiplied and in float32, their log_softmax
                # and gradients. And the head's gradient, with that of the chunk.
                alone = 20.0 * CHUNK * rows + 2 * gradient
                self.backward = 4.0 * (rows + labels) * width + gradient
                moved += 3 * gradient
        if theirs is not None and objective.logit and spans:
            our_rows, their_rows, places = rows, theirs.vocab_size, spans
            if objective.outside == "respell":
                places = max(labels, spans)
                # Of a chunk, the teacher's logits as they are multiplied and in float32, and their
                # softmax; the student's, the target and gradients, and those of cross-entropy. And
                # the head's gradient, with that of the chunk.
                wide = 4.0 * min(places, CHUNK) * (3 * their_rows + 7 * our_rows)
                self.forward = wide + 2 * gradient
                moved += 28.0 * labels * rows
            else:
                if shared is not None and objective.outside != "bucket":
                    our_rows = shared
                if shared is not None and objective.outside == "renormalise":
                    their_rows = shared
                plan = self._plan(objective, ours, theirs, spans, shared, dtype)
                self.forward = plan.peak_bytes
            # Its gradients are made in the forward and wait; in the backward they are put in place.
            waiting = 4.0 * (our_rows + places) * width
            self.backward += waiting + gradient
            alone += waiting
            gemms[places, our_rows, width] += 1
            gemms[spans, their_rows, theirs.hidden_size] += 1
            gemms[places, width, our_rows] += 1
            gemms[our_rows, width, places] += 1
            moved += 4.0 * (3 * places * our_rows + spans * their_rows) + 3 * gradient
            self.exponentials += 2.0 * (places * our_rows + spans * their_rows)
        self.forward = max(self.forward, alone)
        self.work = Work(gemms, moved, 60)

    @staticmethod
    def _plan(
        objective: Objective,
        ours: Any,
        theirs: Any,
        spans: int,
        shared: int | None,
        dtype: torch.dtype,
    ) -> Any:
        def empty(*shape: int, grad: bool = False) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)

        ids = None if shared is None else torch.empty(shared, dtype=torch.int64, device="meta")
        return explain(
            linear_span_kl,
            empty(spans, ours.hidden_size, grad=True),
            empty(ours.vocab_size, ours.hidden_size, grad=True),
            empty(spans, theirs.hidden_size),
            empty(theirs.vocab_size, theirs.hidden_size),
            temperature=objective.temperature,
            direction=objective.direction,
            reduction="sum",
            vocab=None if ids is None else (ids, ids),
            outside=objective.outside,
            return_shared_mass=objective.outside != "renormalise",
        )


def available_memory(device: torch.device | str = "cpu") -> float:
    """GiB of a GPU, or what is free of main memory now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return available_bytes() / 2**30
