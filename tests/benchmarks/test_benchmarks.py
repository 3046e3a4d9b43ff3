"""The suite measures the right thing: its answers, its refusals, its files. Speed is not judged."""

import csv
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import plot, registry, run
from benchmarks.measure import (
    WARM_UP,
    Effort,
    Refused,
    error,
    interleave,
    measure,
    peak_mib,
    verify,
)
from benchmarks.registry import Job
from benchmarks.span_com import BENCHMARK as SPAN_COM
from sra_kernels.span_com.reference import span_com as reference

SPEEDY = Effort(most=2, least=2, seconds=0)
SMALL = [
    pytest.param(
        name,
        case,
        id=f"{name}: {registry.label(case)}",
        marks=[pytest.mark.models] if name == "alignment" else [],
    )
    for name in registry.NAMES
    for case in registry.load(name).small
]


def inputs(name, case):
    try:
        return registry.load(name).inputs(case)
    except RuntimeError as reason:  # models that are neither in the cache nor to be fetched
        pytest.skip(str(reason))


def providers(name):
    """torch.compile takes seconds a case: it runs in one case of the table and in the suite."""
    return [p for p in registry.load(name).providers if not p.startswith("torch.compile")]


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_every_provider_is_right(name, case):
    benchmark = registry.load(name)
    data = inputs(name, case)
    exact = benchmark.exact(data)
    for provider in providers(name):
        verify(benchmark.providers[provider](data), exact, benchmark.tolerance(case))


def test_the_compiled_provider_is_right():
    case = SPAN_COM.small[-1]
    data = SPAN_COM.inputs(case)
    job = SPAN_COM.providers["torch.compile(index_add)"](data)
    verify(job, SPAN_COM.exact(data), SPAN_COM.tolerance(case))


def test_the_exact_answer_is_the_reference_in_float64():
    case = next(c for c in SPAN_COM.small if c.grads == "hidden+weights" and c.lengths == "mixed")
    x = SPAN_COM.inputs(case)
    hidden = x.hidden.detach().double().requires_grad_()
    weights = x.weights.detach().double().requires_grad_()
    com, _ = reference(hidden, x.spans, weights)
    com.backward(x.upstream.double())
    for got, want in zip(SPAN_COM.exact(x), (com, hidden.grad, weights.grad), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


def zero_row(x):
    return x.index_fill(0, torch.tensor([3]), 0)


WRONG = {
    "10 % too large": lambda outputs: [outputs[0], outputs[1] * 1.1, *outputs[2:]],
    "one row of zeros": lambda outputs: [zero_row(outputs[0]), *outputs[1:]],
    "no gradient": lambda outputs: outputs[:1],
    "another shape": lambda outputs: [outputs[0][:-1], *outputs[1:]],
    "NaN": lambda outputs: [outputs[0], outputs[1] * torch.nan],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_provider_is_refused_and_not_timed(wrong, monkeypatch):
    case = next(c for c in SPAN_COM.small if c.grads == "hidden" and c.dtype == "bfloat16")

    def planted(x):
        inner = SPAN_COM.providers["embedding_bag"](x)
        return Job(lambda: wrong(inner.run()), inner.reset)

    def broken(x):
        return Job(lambda: 1 / 0)

    planted_too = {"planted": planted, "broken": broken, "fine": SPAN_COM.providers["ours"]}
    monkeypatch.setattr(
        "benchmarks.span_com.BENCHMARK", dataclasses.replace(SPAN_COM, providers=planted_too)
    )
    said = []
    rows = {r["provider"]: r for r in measure("span_com", case, SPEEDY, False, said.append)}
    assert rows["planted"]["status"].startswith("refused: ")
    assert rows["broken"]["status"] == "refused: ZeroDivisionError: division by zero"
    assert all("median_ms" not in rows[name] for name in ("planted", "broken"))
    assert rows["fine"]["samples"] == 2
    assert [line.split()[0] for line in said] == ["planted", "broken"]


def test_errors_are_relative_to_each_row():
    exact = torch.tensor([[100.0, 1.0], [0.01, 0.0]])
    assert error(exact + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), exact) == pytest.approx(0.01)
    assert error(exact + torch.tensor([[0.0, 0.0], [0.01, 0.0]]), exact) == pytest.approx(1.0)
    assert error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    assert error(torch.full((2, 3), 1e-9), torch.zeros(2, 3)) == float("inf")
    with pytest.raises(Refused, match="shape"):
        error(torch.zeros(2, 3), torch.zeros(3, 2))


def test_turns_alternate_and_resets_are_between_them():
    seen = []
    jobs = {x: Job(lambda x=x: seen.append(x) or [], lambda x=x: seen.append(x * 2)) for x in "ab"}
    times = interleave(jobs, Effort(most=3, least=1, seconds=9))
    assert seen == ["a", "aa", "b", "bb"] * (WARM_UP + 3)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_what_the_run_makes():
    shape = next(c for c in SPAN_COM.small if c.grads == "hidden" and c.dtype == "float32")
    case = dataclasses.replace(shape, tokens=8192, dim=1024, lengths="16", spans=512)
    made = (8192 + 512) * 1024 * 4 / 2**20
    assert made <= peak_mib("span_com", case, "ours") <= made + 2


def test_a_run_writes_csv_table_and_picture(tmp_path):
    only = "forward .*bfloat16.*lengths=mixed"
    options = ["--quick", "--op", "span_com", "--only", only, "--out", str(tmp_path)]
    eager = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than all the rest
    subprocess.run([sys.executable, "-m", "benchmarks.run", *options], check=True, env=eager)
    with (tmp_path / "span_com.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["malloc"] for row in rows} <= set(run.TUNABLES)
    assert {row["provider"] for row in rows} == {"copy", *SPAN_COM.providers}
    assert {row["lengths"] for row in rows} == {"mixed"}
    assert all(row["status"] == "ok" and float(row["median_ms"]) > 0 for row in rows)
    assert all(
        float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows
    )
    assert not (tmp_path / "alignment.csv").exists()

    table = (tmp_path / "span_com.md").read_text()
    assert "![span_com](span_com.svg)" in table
    assert f"| {plot._cell(rows[0], 'median_ms')} |" in table
    first = (tmp_path / "span_com.svg").read_bytes()
    plot.write(tmp_path / "span_com.csv")
    assert (tmp_path / "span_com.svg").read_bytes() == first


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_speed(benchmark, name, case):
    """For pytest-benchmark: `pytest tests/benchmarks --benchmark-only`, ours in small sizes."""
    job = registry.load(name).providers["ours"](inputs(name, case))
    benchmark.pedantic(job.run, setup=job.reset, rounds=20, warmup_rounds=2)
