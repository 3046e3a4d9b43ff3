"""Compiles every Triton kernel of the library for one target, without a GPU.

`python -m tests.aot.compile_triton sm_90` prints a row for each distinct launch: what it is, what
it takes, how it reads memory. It fails when a launch does not compile, or a bucket of a table of
configurations is never launched. Targets: sm_80, sm_90, sm_100, gfx942.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

import sra_kernels
from sra_kernels import tuning
from tests.aot import inspect_kernel, stub_driver
from tests.aot.addresses import narrow_products
from tests.aot.cases import Case, cases
from tests.aot.rows import Row, show, write
from tests.aot.stub_driver import Launch


class Compilation:
    """The launches of each case, and a row for each that is new."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.usages: dict[str, inspect_kernel.Usage] = {}
        self.buckets: set[tuple[int, str]] = set()  # (id of the table, bucket)
        self.failures: list[str] = []
        self.case: Case | None = None

    def record(self, launch: Launch) -> None:
        assert self.case is not None
        code = launch.compiled.hash
        if code not in self.usages:
            self.usages[code] = inspect_kernel.of_triton(launch.compiled)
        usage, ttir = self.usages[code], launch.compiled.asm["ttir"]
        row = Row(
            target=self.target,
            kernel=f"{op_of(launch.function.module)}.{launch.name}",
            dtype=str(self.case.dtype).removeprefix("torch."),
            case=self.case.name,
            config=config_of(launch),
            registers=usage.registers,
            spills=usage.spills,
            stack=usage.stack,
            shared=usage.shared,
            aligned=self.case.aligned,
            load=usage.widest_load,
            wide_percent=usage.wide_percent,
            loads=usage.loads_text,
            overflows="; ".join(narrow_products(ttir, launch.grid, launch.arguments)),
        )
        self.rows.setdefault((code, row.kernel, row.dtype, row.aligned, row.overflows), row)

    def run(self, cases: Iterable[Case]) -> None:
        stub_driver.install(self.target, self.record)
        self._watch_buckets()
        for case in cases:
            self.case = case
            try:
                case.run()
            except Exception:
                what = f"{self.target}: {case.op}, {case.name}, {case.dtype}"
                self.failures.append(f"{what}\n{traceback.format_exc()}")
        self.failures += self._buckets_left()

    def _watch_buckets(self) -> None:
        """Before the ops' modules are imported, which take `chosen` by name."""
        choose = tuning.chosen

        def chosen(
            kernel: str, configs: tuning.Configs, bucket: str, device: torch.device, launch: Any
        ) -> tuning.Config:
            own = f"{bucket}@{self.target}"
            self.buckets.add((id(configs), own if own in configs else bucket))
            return choose(kernel, configs, bucket, device, launch)

        tuning.chosen = chosen

    def _buckets_left(self) -> Iterator[str]:
        for module, name, table in config_tables():
            for bucket in table:
                elsewhere = "@" in bucket and not bucket.endswith(f"@{self.target}")
                replaced = f"{bucket}@{self.target}" in table
                if (id(table), bucket) not in self.buckets and not elsewhere and not replaced:
                    yield f"{self.target}: no case launches {module.__name__}.{name}[{bucket!r}]"


def op_of(module: str) -> str:
    """A kernel may move to another file of its op."""
    return module.removeprefix("sra_kernels.").partition(".")[0]


def config_of(launch: Launch) -> str:
    """The compile-time sizes and launch options."""
    constants = [p.name for p in launch.function.params if p.is_constexpr]
    chosen = {name: launch.arguments[name] for name in constants if name in launch.arguments}
    return " ".join(f"{name}={value}" for name, value in {**chosen, **launch.options}.items())


def config_tables() -> Iterator[tuple[ModuleType, str, dict[str, Any]]]:
    for module in modules():
        for name, table in vars(module).items():
            if isinstance(table, dict) and table and all(map(is_candidates, table.values())):
                yield module, name, table


def is_candidates(x: object) -> bool:
    return isinstance(x, tuple) and bool(x) and isinstance(x[0], tuning.Config)


def modules() -> Iterator[ModuleType]:
    """The modules of sra_kernels that import triton, as far as the cases have loaded them."""
    for found in pkgutil.walk_packages(sra_kernels.__path__, "sra_kernels."):
        module = sys.modules.get(found.name)
        if module is not None and "triton" in vars(module):
            yield importlib.import_module(found.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=stub_driver.TARGETS)
    parser.add_argument("--csv", help="write the rows there instead of printing a table")
    options = parser.parse_args()
    compilation = Compilation(options.target)
    compilation.run(cases())
    rows = list(compilation.rows.values())
    if options.csv:
        write(options.csv, rows)
    else:
        show(rows)
    print(*compilation.failures, sep="\n", file=sys.stderr)
    return 1 if compilation.failures else 0


if __name__ == "__main__":
    sys.exit(main())
