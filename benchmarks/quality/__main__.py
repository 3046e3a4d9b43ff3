"""Every method on every setting, each at the options that suit it, into one CSV.

    python -m benchmarks.quality                      every method, and again to go on
    python -m benchmarks.quality --ablations          the ablations too (about a day)
    python -m benchmarks.quality --minutes 110        starts no run after that
    python -m benchmarks.quality --speed              seconds and memory, alone on the machine
    python -m benchmarks.quality --small              one seed of some methods, at the rates and
                                                      shares that the CSV chose; under 20 minutes
    python -m benchmarks.quality --csv mine.csv       into another file: all runs anew
    python -m benchmarks.quality --page               docs/evidence.md and the README's sentence
                                                      from the CSV (or --csv), no runs

For each method the learning rate and the share of cross-entropy are chosen on the dev split, with
as many tries for each; then three seeds are measured on the test split. The control with one
tokenizer takes what was chosen on the first pair, which has the same student; an ablation what was
chosen for the recipe that it changes.
The students as they start and the teachers are measured too.

Two commands with different --settings may run side by side into one CSV (prune-qwen and same belong
together), but for --speed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import gradients, page
from benchmarks.quality.grid import chosen, tries
from benchmarks.quality.run import Bench, settle, timed
from benchmarks.quality.settings import (
    ABLATED,
    ABLATIONS,
    BOUNDS,
    DEV_SEED,
    MAIN,
    PARENTS,
    REGIMES,
    SEEDS,
    SETTINGS,
    SPEED,
    UNTRAINED,
    Regime,
)
from benchmarks.quality.table import Run, append, of, read

HERE = Path(__file__).parents[1] / "results"
CSV, SMALL_CSV = HERE / "quality.csv", HERE / "quality-small.csv"
SMALL = ("cross-entropy", "alm", "paper", "boundary", "respell")
Case = tuple[str, Regime, str, str, float, float, int]


def cases(
    done: Sequence[Run], settings: Sequence[str], regimes: Sequence[Regime],
    variants: Sequence[str], *, tuned: Sequence[Run] | None = None, seeds: Sequence[int] = SEEDS,
) -> Iterator[Case]:  # fmt: skip
    """What is missing, in order, as far as it is known; to be asked again after each run.

    tuned: runs on the dev split that say what to choose, so that none are to be made.
    """
    for setting, regime, variant in itertools.product(settings, regimes, variants):
        parent = PARENTS.get(variant, variant)
        if variant in ABLATIONS and (setting, regime.name) not in ABLATED.get(
            variant, ABLATED[parent]
        ):
            continue
        mine = of(done, setting=setting, regime=regime.name, steps=regime.steps)
        tuned_on = SETTINGS[setting].tuned_on
        tried = of(
            done if tuned is None else tuned, setting=tuned_on, regime=regime.name,
            steps=regime.steps, variant=parent, split="dev",
        )  # fmt: skip
        rates = SETTINGS[tuned_on].rates
        for rate, alpha in tries(parent, rates, tried) if tuned is None else ():
            if not of(tried, learning_rate=rate, alpha=alpha):
                yield tuned_on, regime, parent, "dev", rate, alpha, DEV_SEED
        if choice := chosen(parent, rates, tried):
            seen = of(mine, variant=variant, split="test", learning_rate=choice[0], alpha=choice[1])
            for seed in seeds:
                if not of(seen, seed=seed):
                    yield setting, regime, variant, "test", *choice, seed


def bounds(done: Sequence[Run], settings: Sequence[str]) -> Iterator[Case]:
    """Students before any training, and teachers, that have not been measured yet."""
    for setting, name in itertools.product(settings, BOUNDS):
        if not of(done, setting=setting, variant=name):
            yield setting, UNTRAINED, name, "test", 0.0, 0.0, DEV_SEED


def timings(
    done: Sequence[Run], settings: Sequence[str], variants: Sequence[str]
) -> Iterator[Case]:
    """What has not been timed yet; SeqKD's steps are those of cross-entropy."""
    timed = [name for name in variants if name in MAIN and name != "seqkd"]
    for setting, variant in itertools.product(settings, timed):
        if not of(done, setting=setting, variant=variant, split="speed"):
            yield setting, SPEED, variant, "speed", SETTINGS[setting].rates[0], 0.5, DEV_SEED


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--regimes", nargs="*", choices=REGIMES, default=[*REGIMES])
    parser.add_argument("--variants", nargs="*", choices=[*MAIN, *ABLATIONS], default=[*MAIN],
                        help="none: students and teachers as they are")  # fmt: skip
    parser.add_argument("--ablations", action="store_true", help="the ablations too")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after that")
    parser.add_argument("--speed", action="store_true", help="time a few steps of each")
    parser.add_argument("--small", action="store_true", help="one pair, few methods, one seed")
    parser.add_argument("--page", action="store_true", help="remake docs/evidence.md, run nothing")
    parser.add_argument("--csv", type=Path, help="where the runs are kept")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="for models")
    args = parser.parse_args(argv)
    csv = args.csv or (SMALL_CSV if args.small else CSV)
    if args.page:
        page.write(read(csv), read(gradients.CSV, gradients.Pull))
        return
    settle()
    settings, regimes = args.settings, [REGIMES[name] for name in args.regimes]
    variants = [*args.variants, *(ABLATIONS if args.ablations else ())]
    if args.small:
        settings, variants = ["prune-qwen"], [*SMALL]
    began, bench = time.perf_counter(), None

    def missing() -> Iterator[Case]:
        done = read(csv)
        if args.small:
            yield from cases(done, settings, regimes, variants, tuned=read(CSV), seeds=SEEDS[:1])
        elif not args.speed:
            yield from bounds(done, settings)
            yield from cases(done, settings, regimes, variants)
        if args.speed or (settings == [*SETTINGS] and not args.small):
            yield from timings(done, settings, variants)

    while case := next(missing(), None):
        if time.perf_counter() - began > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over. The same command goes on.")
            break
        setting, regime, variant, split, rate, alpha, seed = case
        options: dict[str, Any] = {"rate": rate, "alpha": alpha, "seed": seed}
        if split == "speed":
            bench = None  # its memory is the other process's
            run = timed(SETTINGS[setting], args.folder, variant, regime, **options)
        else:
            if bench is None or bench.setting.name != setting:
                bench = Bench(SETTINGS[setting], args.folder)
            run = bench.run(variant, regime, split, **options)
        if case in missing():  # not made meanwhile by another command: a seed counts once
            append(csv, run)
        print(
            f"{(time.perf_counter() - began) / 60:5.1f} min  {setting}, {regime.name}, {variant}, "
            f"{split}, rate {rate:g}, alpha {alpha:g}, seed {seed}: {run.bits_per_byte:.4f} bits "
            f"per byte, {run.seconds_a_step:.2f} s a step",
            flush=True,
        )
    if args.small:
        runs = of(read(csv), split="test")
        print(
            page.tables(runs, [*settings], [x.name for x in regimes]), page.costs(runs), sep="\n\n"
        )
    elif csv == CSV:
        page.write(read(csv), read(gradients.CSV, gradients.Pull))


if __name__ == "__main__":
    main()
