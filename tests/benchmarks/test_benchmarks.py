"""The suite measures the right thing: answers, refusals, rooflines. Speed is not judged."""

import dataclasses
import sys

import pytest
import torch

from benchmarks import registry
from benchmarks.measure import (
    AT_LEAST,
    SMALL_ROW,
    WARM_UP,
    Effort,
    Refused,
    error,
    interleave,
    measure,
    peak_mib,
    verify,
)
from benchmarks.providers import on_backend, rival
from benchmarks.registry import Absent, Job
from benchmarks.span_com import BENCHMARK as SPAN_COM
from sra_kernels import native

SPEEDY = Effort(most=2, least=2, seconds=0)
OPS = ("span_com", "span_kl", "linear_span_kl", "attention_mass", "span_geometry")
SMALL = [
    pytest.param(
        name,
        case,
        id=f"{name}: {registry.label(case)}",
        marks=[pytest.mark.models] if name == "alignment" else [],
    )
    for name in (*OPS, "alignment")
    for case in registry.load(name).small
]


def inputs(name, case):
    try:
        return registry.load(name).inputs(case)
    except RuntimeError as reason:  # models that are neither in the cache nor to be fetched
        pytest.skip(str(reason))


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_every_provider_is_right(name, case):
    """But for those that torch.compile makes: they take seconds a case, and the suite has them."""
    benchmark = registry.load(name)
    data = inputs(name, case)
    exact = benchmark.exact(data)
    for provider, prepare in benchmark.providers.items():
        if provider.startswith("torch.compile"):
            continue
        try:
            job = prepare(data)
        except Absent:
            continue
        try:
            verify(job, exact, benchmark.tolerance(case))
        except Refused:
            if case.dtype == "float32" or provider.startswith("ours"):
                raise


def test_a_compiled_provider_is_right():
    case = SPAN_COM.small[-1]
    data = SPAN_COM.inputs(case)
    job = SPAN_COM.providers["torch.compile(index_add)"](data)
    verify(job, SPAN_COM.exact(data), SPAN_COM.tolerance(case))


@pytest.mark.parametrize("name", OPS)
def test_the_exact_answer_is_that_of_the_eager_reference(name):
    benchmark = registry.load(name)
    for case in benchmark.small:
        if case.dtype != "float32":
            continue
        data = benchmark.inputs(case)
        job = on_backend("reference", benchmark.providers["ours"])(data)
        assert verify(job, benchmark.exact(data), benchmark.tolerance(case)) < 1e-4


@pytest.mark.parametrize("name", OPS)
def test_every_op_counts_its_work_and_names_its_cases(name):
    benchmark = registry.load(name)
    data = benchmark.inputs(benchmark.small[0])
    assert benchmark.bytes_moved(data) > 0
    assert set(benchmark.headline_only) <= set(benchmark.providers)
    assert any(benchmark.headline(case) for case in benchmark.cases)
    labels = [registry.label(case) for case in benchmark.cases]
    assert len(set(labels)) == len(labels)
    for prepare in benchmark.bounds.values():
        prepare(data).run()


def zero_row(x):
    return x.index_fill(0, torch.tensor([3]), 0)


WRONG = {
    "10 % too large": lambda outputs: [outputs[0], outputs[1] * 1.1, *outputs[2:]],
    "one row of zeros": lambda outputs: [zero_row(outputs[0]), *outputs[1:]],
    "no gradient": lambda outputs: outputs[:1],
    "another shape": lambda outputs: [outputs[0][:-1], *outputs[1:]],
    "NaN": lambda outputs: [outputs[0], outputs[1] * torch.nan],
}


def planted(monkeypatch, **changes):
    """A benchmark like span_com's, with one thing or another changed."""
    benchmark = dataclasses.replace(SPAN_COM, **changes)
    monkeypatch.setattr("benchmarks.span_com.BENCHMARK", benchmark)
    case = next(c for c in SPAN_COM.small if c.grads == "hidden" and c.dtype == "bfloat16")
    said = []
    rows = {r["provider"]: r for r in measure("span_com", case, SPEEDY, False, said.append)}
    return rows, said


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_provider_is_refused_and_not_timed(wrong, monkeypatch):
    def plant(x):
        inner = SPAN_COM.providers["embedding_bag"](x)
        return Job(lambda: wrong(inner.run()), inner.reset)

    def broken(x):
        return Job(lambda: 1 / 0)

    providers = {"planted": plant, "broken": broken, "ours": SPAN_COM.providers["ours"]}
    rows, said = planted(monkeypatch, providers=providers)
    assert rows["planted"]["status"].startswith("refused: ")
    assert rows["broken"]["status"] == "refused: ZeroDivisionError: division by zero"
    assert all("median_ms" not in rows[name] for name in ("planted", "broken"))
    assert rows["ours"]["samples"] == 2
    assert [line.split()[0] for line in said] == ["planted", "broken"]


def test_a_rival_that_is_not_installed_is_a_row_that_says_so(monkeypatch):
    def missing(x):
        return rival("no_such_library", "no-such-library==1.0")

    rows, said = planted(monkeypatch, providers={"missing": missing, **SPAN_COM.providers})
    assert rows["missing"]["status"] == "not installed: pip install no-such-library==1.0"
    assert rows["missing"]["kind"] == "rival"
    assert not said


def test_a_rival_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_rival.py").write_text("raise OSError('libfoo.so: no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match=r"not installed: libfoo\.so: no such symbol"):
        rival("broken_rival", "broken-rival")


def test_without_an_exact_answer_results_must_be_finite(monkeypatch):
    providers = {
        "other": lambda x: Job(lambda: [torch.ones(3)]),
        "NaN": lambda x: Job(lambda: [torch.tensor([1.0, torch.nan])]),
    }
    rows, _ = planted(monkeypatch, exact=None, providers=providers)
    assert rows["other"]["status"] == "ok"
    assert rows["other"]["error_vs_float64"] is None
    assert rows["NaN"]["status"] == "refused: a result is not finite"


def test_providers_that_take_seconds_run_in_headline_cases_alone(monkeypatch):
    only = ["embedding_bag"]
    for headline in (True, False):
        with monkeypatch.context() as patch:
            rows, _ = planted(
                patch,
                providers={p: SPAN_COM.providers[p] for p in ("ours", "embedding_bag")},
                headline_only=only,
                headline=lambda case, headline=headline: headline,
            )
        assert ("embedding_bag" in rows) == headline


@pytest.mark.parametrize(("flops", "bound"), [(0, "copy"), (10**12, "GEMM")])
def test_the_roofline_is_that_of_the_slower_of_memory_and_arithmetic(flops, bound, monkeypatch):
    rows, _ = planted(
        monkeypatch,
        providers={"ours": SPAN_COM.providers["ours"]},
        bounds={"its sum alone": lambda x: Job(lambda: [x.hidden.sum()])},
        flops=lambda x: flops,
        bytes_moved=lambda x: 8 << 20,
    )
    assert [row["kind"] for row in rows.values()] == ["bound", "bound", "bound", "ours"]
    copy, gemm, alone, ours = rows.values()
    assert copy["gb_per_s"] == pytest.approx((8 << 20) / copy["median_ms"] / 1e6)
    least = {"copy": copy["median_ms"], "GEMM": flops / 2 / 1024**3 * gemm["median_ms"]}
    for row in (alone, ours):
        assert row["bound"] == bound
        assert row["pct_of_roofline"] == pytest.approx(100 * least[bound] / row["median_ms"])


def test_errors_are_relative_to_each_row():
    exact = torch.tensor([[100.0, 1.0], [1.0, 0.0]])
    assert error(exact + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), exact) == pytest.approx(0.01)
    assert error(exact + torch.tensor([[0.0, 0.0], [1.0, 0.0]]), exact) == pytest.approx(1.0)
    assert error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    assert error(torch.full((2, 3), 1e-9), torch.zeros(2, 3)) == float("inf")
    with pytest.raises(Refused, match="shape"):
        error(torch.zeros(2, 3), torch.zeros(3, 2))


def test_a_row_of_next_to_nothing_counts_as_a_small_one():
    exact = torch.tensor([[1.0], [1e-9], [0.0]])
    off = torch.tensor([[0.0], [1e-5], [2e-5]])
    assert error(exact + off, exact) == pytest.approx(2e-5 / SMALL_ROW)


def test_turns_alternate_and_resets_are_between_them():
    seen = []
    jobs = {x: Job(lambda x=x: seen.append(x) or [], lambda x=x: seen.append(x * 2)) for x in "ab"}
    times = interleave(jobs, Effort(most=3, least=1, seconds=9))
    assert seen == ["a", "aa", "b", "bb"] * (WARM_UP + 3)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_a_late_case_still_gets_samples(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "benchmarks.measure.interleave", lambda jobs, effort: seen.append(effort) or {}
    )
    monkeypatch.setattr("benchmarks.measure._roofline", lambda *args: None)
    measure("span_com", SPAN_COM.small[0], Effort(seconds=-1), False, print)
    measure("span_com", SPAN_COM.small[0], Effort(seconds=900), False, print)
    assert seen[0] == Effort(seconds=AT_LEAST)
    assert 60 < seen[1].seconds < 900 / 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(native.cpu is None, reason="the C++ kernel makes nothing but its results")
def test_peak_memory_is_that_of_what_the_run_makes():
    shape = next(c for c in SPAN_COM.small if c.grads == "hidden" and c.dtype == "float32")
    case = dataclasses.replace(shape, tokens=8192, dim=1024, lengths="20", spans=410)
    made = (8192 + 410) * 1024 * 4 / 2**20
    assert made <= peak_mib("span_com", case, "ours") <= made + 2


@pytest.mark.parametrize(("name", "case"), SMALL)
def test_speed(benchmark, name, case):
    """For pytest-benchmark: `pytest tests/benchmarks --benchmark-only`, ours in small sizes."""
    job = registry.load(name).providers["ours"](inputs(name, case))
    benchmark.pedantic(job.run, setup=job.reset, rounds=20, warmup_rounds=2)
