"""What is compared: pairs, amounts of data, methods with their options, and the grid that is tried
for each of them on the dev split."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A pair of models and a language.

    layers: the student is cut to so many first, evenly spaced; None: it stays whole.
    language: of the instructions; `other`: of the text on which forgetting is measured.
    tuned_on: the setting, with the same student, on whose dev split rates and shares are chosen.
    rates: of learning that are tried there, from the lowest.
    """

    name: str
    title: str
    student: str
    teacher: str
    layers: int | None
    language: str
    other: str
    tuned_on: str
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 2e-3)


SMOL, QWEN, GEMMA = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct", "Gemma-3-270M"
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("prune-qwen", "Pruned, from Qwen", SMOL, QWEN, 16, "en", "zh", "prune-qwen"),
        Setting("prune-gemma", "Pruned, from Gemma", SMOL, GEMMA, 16, "en", "zh", "prune-gemma"),
        # A whole student unlearns where a pruned one still learns.
        Setting("chinese", "New language, from Qwen", SMOL, QWEN, None, "zh", "en", "chinese",
                rates=(3e-5, 1e-4, 3e-4, 1e-3)),
        Setting("same", "Pruned, from its whole self", SMOL, SMOL, 16, "en", "zh", "prune-qwen"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Regime:
    """How many rows there are, and how many steps are made on them."""

    name: str
    title: str
    rows: int
    steps: int


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("fresh", "one pass over fresh data", rows=256, steps=64),
        Regime("little", "many passes over little data", rows=32, steps=64),
    )
}

BATCH = 4
# Of so few steps. With a tenth of them for warm-up and beta2 = 0.999, the three seeds of
# cross-entropy at its best rate gave 1.76, 1.82 and 2.12 bits per byte; so, 1.69, 1.72 and 1.73.
WARMUP, BETA2 = 4, 0.95  # a quarter
DEV, TEST, OTHER = 24, 48, 24  # rows
ANSWERED, ANSWER = 16, 64  # test rows that are answered for ROUGE-L, in so many tokens
MAX_TOKENS = 128  # rows are chosen to fit, so that a step takes seconds on two cores
SEEDS = (1, 2, 3)
DEV_SEED = 0
# A few steps of each method, the only ones that run alone on the machine; three warm up.
SPEED = Regime("speed", "what a step costs", rows=44, steps=11)
# Between which the methods lie: what every run begins with, and what it learns from.
BOUNDS = {"start": "*the student before*", "teacher": "*its teacher*"}
UNTRAINED = Regime("none", "no training", rows=0, steps=0)

Options = dict[str, Any]

# The methods of the main table. Names without `method` are recipes of SRA. Vocabularies are paired
# as by default: by bytes, but for the paper's recipe, which compares strings.
MAIN: dict[str, Options] = {
    "cross-entropy": {"recipe": "cross-entropy"},
    "respell": {"recipe": "respell"},
    "alm": {"method": "alm"},
    "boundary": {"recipe": "boundary"},
    "paper": {"recipe": "paper"},
    "gold-bayesian": {"method": "gold-bayesian"},
    "simple-ctkd": {"method": "simple-ctkd"},
    # Its projectors begin where they fit, and 5e-4, its authors' rate for long runs, leads them
    # away: dev bits per byte, fresh and little, 2.09 and 2.82; at 5e-5, 1.92 and 2.58. (DSKD's own
    # begin anywhere: fresh, 1.99 at 5e-4, 2.05 at its authors' 1e-3, 2.07 at temperature 1.)
    "dskd-eta": {"method": "dskd-eta", "projector_learning_rate": 5e-5},
    "dskd": {"method": "dskd"},
    "mined": {"method": "mined"},
    "multilevel-ot": {"method": "multilevel-ot"},
    "uld": {"method": "uld"},
    "gold-observed": {"method": "gold-observed"},
    "seqkd": {"recipe": "cross-entropy"},
}
OURS = ("respell", "boundary", "paper")

ACCIDENTS = "paper: its authors' accidents"  # see accidents.py

# Each from its recipe or method, by one change or the few that are named.
ABLATIONS: dict[str, Options] = {
    "paper: logit": {"recipe": "paper", "cosine": 0.0, "gamma": 0.0},
    "paper: logit + cosine": {"recipe": "paper", "gamma": 0.0},
    "paper: logit + geometry": {"recipe": "paper", "cosine": 0.0},
    "paper: cosine + geometry": {"recipe": "paper", "logit": 0.0},
    "paper: spans not weighed": {"recipe": "paper", "power": 0.0},
    "paper: tokens not weighed": {"recipe": "paper", "pooling": "mean"},
    "paper: neither weighed": {"recipe": "paper", "power": 0.0, "pooling": "mean"},
    "paper: at span ends": {"recipe": "paper", "logit_state": "end"},
    "paper: mass weight": {"recipe": "paper", "outside": "weight"},
    "paper: bucket": {"recipe": "paper", "outside": "bucket"},
    "paper: mean over spans": {"recipe": "paper", "normaliser": "spans"},
    ACCIDENTS: {"recipe": "paper"},
    "paper: temperature 1": {"recipe": "paper", "temperature": 1.0},
    "paper: gamma 1": {"recipe": "paper", "gamma": 1.0},
    "paper: gamma 10": {"recipe": "paper", "gamma": 10.0},
    "paper: normalised vocabulary": {"recipe": "paper", "vocabulary_match": "normalised"},
    "paper: words": {"recipe": "paper", "granularity": "word"},
    "paper: sentences": {"recipe": "paper", "granularity": "sentence"},
    "boundary: no cosine": {"recipe": "boundary", "cosine": 0.0},
    "boundary: temperature 2": {"recipe": "boundary", "temperature": 2.0},
    "boundary: centres of mass": {"recipe": "boundary", "logit_state": "com"},
    "respell: no cross-entropy": {"recipe": "respell", "alpha": 0.0},
    "respell + likelihood": {"recipe": "respell", "likelihood": 1.0},
    "respell + cosine": {"recipe": "respell", "cosine": 1.0},
    "respell: gamma 1": {"recipe": "respell", "gamma": 1.0},
    "respell: temperature 2": {"recipe": "respell", "temperature": 2.0},
    "respell: mean over spans": {"recipe": "respell", "normaliser": "spans"},
    "respell: likelihood instead": {"recipe": "respell", "logit": 0.0, "likelihood": 1.0},
    "simple-ctkd: no cross-entropy": {"method": "simple-ctkd", "alpha": 0.0},
    "gold-bayesian: no cross-entropy": {"method": "gold-bayesian", "alpha": 0.0},
    "dskd: temperature 1": {"method": "dskd", "temperature": 1.0},
    "dskd: projectors at 1e-3": {"method": "dskd", "projector_learning_rate": 1e-3},
    "dskd-eta: temperature 1": {
        "method": "dskd-eta", "projector_learning_rate": 5e-5, "temperature": 1.0
    },
    "dskd-eta: projectors at 5e-4": {"method": "dskd-eta", "projector_learning_rate": 5e-4},
}  # fmt: skip

VARIANTS = MAIN | ABLATIONS
# An ablation is run at the learning rate and share that were chosen for its recipe or method
# (unless the share is what it changes), where that is at home: the paper's is not where the
# vocabularies share little. One that has an entry of its own in `ABLATED` is run there instead.
PARENTS = {
    name: str(options.get("recipe") or options["method"]) for name, options in ABLATIONS.items()
}
ABLATED = {
    "paper": (("prune-qwen", "fresh"), ("prune-qwen", "little")),
    "boundary": (("prune-qwen", "fresh"),),
    "respell": (("prune-qwen", "fresh"), ("prune-qwen", "little")),
    "simple-ctkd": (("prune-qwen", "fresh"), ("prune-qwen", "little")),
    "gold-bayesian": (("prune-qwen", "fresh"), ("prune-qwen", "little")),
    "dskd": (("prune-qwen", "fresh"),),
    "dskd-eta": (("prune-qwen", "fresh"),),
    # What reaches beyond the shared entries counts most where little is shared.
    "respell: no cross-entropy": tuple(itertools.product(("prune-qwen", "chinese"), REGIMES)),
    "respell + likelihood": tuple(itertools.product(("prune-qwen", "chinese"), REGIMES)),
    "respell: likelihood instead": tuple(itertools.product(("prune-qwen", "chinese"), REGIMES)),
    # Of SmolLM2 and Qwen the same entries are equal by strings and by bytes; of Gemma, which writes
    # spaces in another way, a third.
    "paper: normalised vocabulary": (("prune-gemma", "fresh"), ("prune-gemma", "little")),
}

# Every method is tried as often: at the two middle learning rates, at the one beyond the better of
# them, and, at the best of the three, with two other shares of cross-entropy; or, where there is
# nothing else, at two more learning rates beside the best.
SHARES = (0.2, 0.8)
FINER = (0.6, 1.5)
TRIES = 3 + len(SHARES)


def has_share(variant: str) -> bool:
    return VARIANTS[variant].get("recipe") != "cross-entropy"
