"""What a run leaves behind: CSV, table, picture, the README's block; and two commits compared."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, plot, registry, run
from benchmarks.span_com import BENCHMARK as SPAN_COM

ROOT = Path(__file__).parents[2]
ONLY = "mode=forward .*bfloat16.*lengths=mixed"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with the results of one small case."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--quick", "--op", "span_com", "--only", ONLY, "--out", str(folder)]
    eager = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than all the rest
    subprocess.run([sys.executable, "-m", "benchmarks.run", *options], check=True, env=eager)
    return folder


def rows_of(results):
    with (results / "span_com.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_csv_has_one_row_a_provider(results):
    rows = rows_of(results)
    assert {row["malloc"] for row in rows} <= set(run.TUNABLES)
    usual = {p for p in SPAN_COM.providers if p not in SPAN_COM.headline_only}
    assert {row["provider"] for row in rows} == {"copy", *usual}
    assert {row["lengths"] for row in rows} == {"mixed"}
    timed = [row for row in rows if row["median_ms"]]
    assert {"copy", "ours", "embedding_bag"} <= {row["provider"] for row in timed}
    assert all(row["status"] == "ok" for row in timed)
    assert all(row["status"].startswith("not installed") for row in rows if row not in timed)
    assert all(
        float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in timed
    )
    assert not list(results.glob("alignment.*"))


def test_the_table_shows_what_the_csv_holds(results):
    rows = rows_of(results)
    mine = next(row for row in rows if row["provider"] == "ours")
    bag = next(row for row in rows if row["provider"] == "embedding_bag")
    table = (results / "span_com.md").read_text()
    assert "![span_com](span_com.svg)" in table
    assert f"{plot.number(float(mine['median_ms']))} (" in table
    assert f"{plot.number(float(bag['median_ms']) / float(mine['median_ms']))}×" in table
    for row in rows:
        if not row["median_ms"]:
            assert f"- {row['provider']}, 2 cases: {row['status']}" in table


def test_the_same_csv_gives_the_same_picture(results):
    first = (results / "span_com.svg").read_bytes()
    plot.write(results / "span_com.csv")
    assert (results / "span_com.svg").read_bytes() == first


def quoted(mine, best):
    """A case of two providers, its memory measured."""
    shape = {"op": "span_com", "case": "a shape", "dtype": "float32", "malloc": "default"}
    rest = {"pct_of_roofline": "81.2", "status": "ok", "cpu": "CPU", "threads": "2", "torch": "2"}
    rest |= {"python": "3", "commit": "abc", "dirty": "0", "timestamp": "2026-11-24T00:00"}
    return [
        {"op": "", "kind": kind, "provider": provider, **shape, "median_ms": ms, "peak_mib": mib}
        | rest
        for kind, provider, (ms, mib) in (("ours", "ours", mine), ("rival", "eager", best))
    ]


def test_the_readme_quotes_the_best_rival():
    slow = quoted(("2.0", "10.0"), ("9", "90.0"))[1] | {"provider": "slow"}
    rows = [*quoted(("2.0", "10.0"), ("3.0", "40.0")), slow]
    assert "| span_com | a shape | 2 ms | 81 % | eager | 1.5× | 4× |" in plot.readme([rows])


def test_less_than_a_mebibyte_is_quoted_as_a_bound():
    assert "| 1.5× | > 40× |" in plot.readme([quoted(("2.0", "0.1"), ("3.0", "40.0"))])


def test_the_readme_names_what_was_missing():
    rows = quoted(("2.0", "10.0"), ("3.0", "40.0"))
    missing = rows[1] | {"provider": "elsewhere", "median_ms": "", "status": "not installed: pip"}
    assert plot.readme([[*rows, missing]]).endswith("when this was measured: elsewhere.")


def test_only_the_block_of_the_readme_is_rewritten(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    plot.rewrite_readme(readme, results)
    once = readme.read_text()
    assert once.startswith("before\n<!-- benchmarks -->\n| op |")
    assert once.endswith("\n<!-- /benchmarks -->\nafter\n")
    assert "old" not in once
    plot.rewrite_readme(readme, results)
    assert readme.read_text() == once
    readme.write_text("no block")
    with pytest.raises(ValueError, match="has no block"):
        plot.rewrite_readme(readme, results)


@pytest.mark.parametrize("name", ["benchmarks", "evidence"])
def test_the_readme_of_this_repository_has_the_block(name):
    text = (ROOT / "README.md").read_text()
    assert text.index(f"<!-- {name} -->") < text.index(f"<!-- /{name} -->")


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout"
)
def test_two_commits_are_compared(monkeypatch):
    monkeypatch.setattr(compare, "ROUNDS", 1)
    monkeypatch.setenv("SRA_KERNELS_BUILD", "none")  # both on torch: the build has its own tests
    monkeypatch.setenv("SRA_KERNELS_BACKEND", "torch")
    case = SPAN_COM.small[0]
    table = compare.compare("HEAD", {"span_com": [case]})
    head, _, line, *_ = table.splitlines()
    assert head.startswith("| op | case | HEAD, ms | working tree, ms | as fast |")
    assert line.startswith(f"| span_com | {registry.label(case)} | ")
    assert line.count("×") >= 2


def test_a_commit_that_does_not_exist_is_named():
    with pytest.raises(RuntimeError, match="git has no 'no-such-commit'"):
        compare.compare("no-such-commit", {})


def test_an_op_that_the_other_commit_lacks_is_said_to_be_missing(monkeypatch):
    def missing(name):
        raise ImportError("cannot import name 'span_kl' from 'sra_kernels'")

    monkeypatch.setattr(compare, "load", missing)
    assert compare._time("span_kl", "").startswith("not in that commit: cannot import name")
