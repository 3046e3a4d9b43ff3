"""What `sra distill` is told: a YAML file, the command line, or both; unknown names are errors."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sra.config import SRAConfig
from sra.precision import faster_dtype


@dataclass
class DistillArguments:
    """Models and data, under TRL's names where it has one."""

    model_name_or_path: str = field(
        metadata={"help": "The student: a hub id, a folder, or a name that `sra demo` downloads."}
    )
    teacher_model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={"help": "The teacher, or several; none for the recipe cross-entropy."},
    )
    data: str | None = field(
        default=None, metadata={"help": "Training rows: JSONL, or a folder of `datasets`."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "The same, held out; measured in bits per byte."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the rows while training; needs --max_steps."}
    )
    teacher_names: list[str] | None = field(
        default=None, metadata={"help": 'What a row\'s "teacher" calls each teacher.'}
    )
    teacher_cache: list[str] | None = field(
        default=None,
        metadata={"help": "Folder of `sra cache` for each teacher, which is not loaded then."},
    )
    remember_teacher: bool = field(
        default=False, metadata={"help": "Keep the teacher's states in main memory."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of matrix products: float32, bfloat16, or auto for the faster one here (the "
            "student's weights are trained in float32)."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of both models: eager, sdpa, flash_attention_2, ..."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the student on the hub."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "The same of the teacher."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a model. Only if you trust it."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter by PEFT."})
    lora_r: int = field(default=16, metadata={"help": "Its rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Its dropout."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get one (PEFT's choice if unset)."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint."})
    default_warmup: bool = field(default=True, init=False)  # none was given


# Short names, beside the full ones.
SHORT = {
    "output": "output_dir",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "cpu": "use_cpu",
    "student": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "dataset_name": "data",
}
# Where a first run should not be that of transformers.TrainingArguments.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/distill",
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 200,
    "seed": 0,
    "report_to": "none",
}
# The rest of what a first run may want to set; --help lists these, and all of them on request.
COMMON = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "gradient_checkpointing", "eval_steps", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "run_name", "seed", "use_cpu", "dataloader_num_workers",
)  # fmt: skip

OWN_WORDS = {
    "gradient_checkpointing": "Compute activations again in the backward pass, to save memory.",
    "warmup_steps": "Steps until learning_rate is reached (a tenth of all, unless set).",
    "eval_steps": "Steps from one measurement of eval_data to the next.",
}


def parse(argv: Sequence[str]) -> tuple[DistillArguments, SRAConfig]:
    """The arguments of `sra distill [FILE.yaml] [STUDENT [TEACHER ...]] [--name value ...]`.

    The command line overrides a file, and that `DEFAULTS`.

    Raises:
        ValueError: an unknown name (with the nearest known one), a value of the wrong kind, a file
            that is no mapping.
        FileNotFoundError: no such file.
    """
    parser = _parser()
    known = {
        action.dest: action.nargs == "?" or action.type is string_to_bool
        for action in parser._actions
    }
    positional, named = _split(argv)
    given: dict[str, list[str]] = {name: [str(value)] for name, value in DEFAULTS.items()}
    while positional and positional[0].endswith((".yaml", ".yml")):
        given |= _named(read_yaml(positional.pop(0)), known)
    for index, name in enumerate(("model_name_or_path", "teacher_model_name_or_path")):
        if values := positional[index : index + 1] if index == 0 else positional[1:]:
            given[name] = values
    given |= _named(named, known)
    if "model_name_or_path" not in given:
        raise ValueError("There is no student: sra distill STUDENT TEACHER --data rows.jsonl.")
    _settle(given)
    tokens: list[str] = []
    for name, values in given.items():
        # One token where it can be, so that a value may begin with a dash.
        tokens += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    try:
        arguments, config = parser.parse_args_into_dataclasses(tokens)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}. See sra distill --help.") from None
    arguments.default_warmup = "warmup_steps" not in given
    return arguments, config


def _settle(given: dict[str, list[str]]) -> None:
    """What follows from the rest, unless it is said."""
    if "eval_steps" in given and "eval_data" in given:
        given.setdefault("eval_strategy", ["steps"])
    if not torch.cuda.is_available():
        given.setdefault("dataloader_pin_memory", ["false"])
    if not torch.accelerator.is_available():  # else transformers refuses bf16 on a CPU that has it
        given.setdefault("use_cpu", ["true"])
    if "eval_data" in given:
        given.setdefault("eval_on_start", ["true"])  # a run's report shows before and after
    dtype = given.get("dtype", ["auto"])[0]
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype = {dtype!r}: choose auto, float32 or bfloat16.")
    if "bf16" not in given and "fp16" not in given:
        on_cpu = given.get("use_cpu", ["false"])[0].lower() in ("true", "1", "yes")
        device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
        wanted = faster_dtype(device) if dtype == "auto" else getattr(torch, dtype)
        given["bf16"] = [str(wanted == torch.bfloat16)]


def read_yaml(path: str | Path) -> dict[str, list[str]]:
    """A run's YAML file as names and the words that follow them on a command line."""
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file. Give a YAML file of names and values.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no names and values. Write lines such as `recipe: paper`.")
    return {str(k): _words(v) for k, v in content.items() if v is not None}


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, bool):  # YAML reads `save_strategy: no` as one
        return ["yes" if value else "no"]
    return [str(x) for x in value] if isinstance(value, list) else [str(value)]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}. See sra distill --help.")


def _parser() -> _Parser:
    kinds: Any = [DistillArguments, SRAConfig]
    return _Parser(kinds, prog="sra distill", allow_abbrev=False)


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Positional words, which come first, and the words after each --name."""
    positional: list[str] = []
    named: dict[str, list[str]] = {}
    name = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            named[name] = [value] if equals else []
        elif name is None:
            positional.append(word)
        else:
            named[name].append(word)
    return positional, named


def _named(given: dict[str, list[str]], known: dict[str, bool]) -> dict[str, list[str]]:
    """Full names and their words; `known` says of each name whether it may stand alone."""
    out = {}
    for name, values in given.items():
        full = name.replace("-", "_")
        full = SHORT.get(full, full)
        if full not in known:
            close = difflib.get_close_matches(full, {*known, *SHORT}, n=1, cutoff=0.6)
            hint = f" Did you mean {close[0]!r}?" if close else " See sra distill --help."
            raise ValueError(f"There is no option {name!r}.{hint}")
        if not values and not known[full]:
            raise ValueError(f"--{name} has no value. See sra distill --help.")
        out[full] = values or ["true"]
        if full == "layers":  # -1:-1 looks like an option
            out[full] = [",".join(values)]
    return out


def help_text(*, every: bool = False) -> str:
    """What `sra distill --help` prints: ours and the common ones, or every one."""
    actions = {action.dest: action for action in _parser()._actions}
    own = [f.name for f in fields(DistillArguments) if f.init]
    inherited = {f.name for f in fields(SRAConfig.__mro__[1])}
    objective = [f.name for f in fields(SRAConfig) if f.name not in inherited]
    groups = [
        ("Models and data", own),
        ("Distillation (what is unset is the recipe's)", objective),
        ("Training", [*COMMON]),
    ]
    if every:
        rest = [name for name in actions if name not in {*own, *objective, *COMMON, "help"}]
        groups.append(("Everything else of transformers.TrainingArguments", rest))
    lines = [
        "usage: sra distill [CONFIG.yaml] STUDENT [TEACHER ...] --data ROWS.jsonl [--name value]",
        "",
        "Train a student from a teacher, or from several, and write it to OUTPUT_DIR/student.",
        "A YAML file holds the same names; the command line overrides it.",
    ]
    back = {full: short for short, full in SHORT.items()}
    for title, names in groups:
        lines += ["", f"{title}:"]
        for name in names:
            action = actions[name]
            short = f" (or --{back[name]})" if name in back else ""
            default = DEFAULTS.get(name, action.default)
            unset = callable(default) or default in (None, "", False, [])
            text = " ".join((OWN_WORDS.get(name) or action.help or "").split())
            if name not in objective and name not in own:
                text = text.split(". ")[0].rstrip(".") + "."
            lines += _wrapped(f"--{name}{short}", text if unset else f"{text} [{default}]")
    if not every:
        lines += ["", "All of transformers.TrainingArguments is taken too: --help-all lists it."]
    return "\n".join(lines)


def _wrapped(name: str, text: str) -> list[str]:
    body = textwrap.wrap(text, 66)
    first = f"  {name}"
    if len(first) > 31 or not body:
        return [first, *(" " * 32 + line for line in body)]
    return [f"{first:<32}{body[0]}", *(" " * 32 + line for line in body[1:])]


def warmup(config: SRAConfig, rows: int) -> None:
    """A tenth of the steps, the default of `sra distill`."""
    steps = config.max_steps
    if steps < 0:
        batch = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        steps = math.ceil(config.num_train_epochs * rows / batch)
    config.warmup_steps = math.ceil(steps / 10)
