"""Runs the blocks of a page with tiny checkpoints in the place of real models."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sra.cli import main
from sra.data import check_row
from tests.docs.pages import ROOT, Block, commands, words

STUDENTS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", "STUDENT")
TEACHERS = (
    "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen2.5-Coder-0.5B-Instruct",
    "Gemma-3-270M",
    "TEACHER",
)
OPTIONAL = ("trl", "peft", "lightning", "datasets", "rouge_score", "tensorboard", "wandb")
STEPS = re.compile(r"(max[_-]steps(?:[ =]|: ))(\d+)")
# Commands of others are not run: what they name must exist, and `sra` after them is not reached.
FOREIGN = ("pip", "make", "git", "accelerate", "torchrun", "python", "export", "cat", "ls", "cd")


class Missing(Exception):
    """A library that a block needs is not installed."""


class Runner:
    """Blocks of one page share a namespace and a folder.

    student, teacher: checkpoint folders that stand in for the models that the page names.
    """

    def __init__(
        self, folder: Path, student: Path, teacher: Path, preamble: Callable[[], dict[str, Any]]
    ) -> None:
        self.folder = folder
        self.names = dict.fromkeys(STUDENTS, str(student)) | dict.fromkeys(TEACHERS, str(teacher))
        longest = sorted(self.names, key=len, reverse=True)
        self.known = re.compile(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, longest))})(?![\w/-])")
        self.preamble = preamble
        self.namespace: dict[str, Any] | None = None

    def run(self, block: Block) -> None:
        """Raises AssertionError with the place, or `Missing`."""
        kinds: dict[str, Callable[[Block], Any]] = {
            "python": self.python,
            "bash": self.bash,
            "yaml": self.file,
            "json": lambda block: json.loads(block.text),
            "jsonl": self.rows,
        }
        if block.language in kinds:
            kinds[block.language](block)

    def python(self, block: Block) -> None:
        for name in OPTIONAL:
            if re.search(rf"^\s*(?:import|from) {name}\b", block.text, re.MULTILINE):
                _need(name)
        if self.namespace is None:
            self.namespace = {"__name__": "__main__", **self.preamble()}
        code = "\n" * (block.line - 1) + self._stand_in(block.text)  # its own line numbers
        try:
            exec(compile(code, str(block.page), "exec"), self.namespace)
        except BaseException as error:
            said = "".join(traceback.format_exception(error, limit=-4))
            raise AssertionError(f"{block.place} fails:\n{block.text}\n{said}") from error

    def bash(self, block: Block) -> None:
        for line in commands(block.text):
            found = words(line)
            if found[0] != "sra":
                check_foreign(found, block.place)
                continue
            argv, stdin = _redirected(words(self._stand_in(line)))
            if "--use_peft" in argv:
                _need("peft")
            if "rouge_l" in argv:
                _need("rouge_score")
            for name in OPTIONAL:
                if name in argv and "--report_to" in argv:
                    _need(name)
            if argv[1] in ("demo", "bench"):  # minutes; their options are checked elsewhere
                continue
            code = _sra(argv[1:], stdin)
            # The doctor says by 2 that a pair runs with a warning, which tiny ones may earn.
            allowed = (0, 2) if argv[1] == "doctor" else (0,)
            assert code in allowed, f"{block.place}: exit code {code} of {line}"

    def file(self, block: Block) -> None:
        """A YAML block whose first line is `# name` becomes that file; each must be YAML."""
        text = self._stand_in(block.text)
        assert yaml.safe_load(text), f"{block.place} holds nothing"
        if name := re.match(r"# (\S+\.ya?ml)\n", text):
            (self.folder / name[1]).write_text(text, encoding="utf-8")

    def rows(self, block: Block) -> None:
        for line in block.text.splitlines():
            check_row(json.loads(line), block.place)

    def _stand_in(self, text: str) -> str:
        text = STEPS.sub(lambda m: m[1] + str(min(int(m[2]), 2)), text)
        return self.known.sub(lambda m: self.names[m[0]], text)


def _need(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise Missing(library)


def _redirected(argv: list[str]) -> tuple[list[str], str | None]:
    if "<" in argv:
        at = argv.index("<")
        return argv[:at], argv[at + 1]
    return argv, None


def _sra(argv: list[str], stdin: str | None) -> int:
    before = sys.stdin
    try:
        if stdin is not None:
            sys.stdin = open(stdin, encoding="utf-8")  # noqa: SIM115
        return main(argv)
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        if sys.stdin is not before:
            sys.stdin.close()
            sys.stdin = before


def check_foreign(found: list[str], place: str) -> None:
    """What a command of another program names is there: a target, an extra, a script, a module."""
    assert found[0] in FOREIGN, f"{place}: {shlex.join(found)} is checked by nothing"
    if found[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (w for w in found[1:] if "=" not in w):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{place}: make {target}"
    if found[0] == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(found))
        pyproject = (ROOT / "pyproject.toml").read_text()
        for extra in ",".join(extras).split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), f"{place}: [{extra}]"
    if found[0] in ("python", "accelerate", "torchrun"):
        for number, word in enumerate(found):
            if word.endswith(".py") and "/" in word:
                script = (ROOT / word).read_text()  # fails if it is not there
                for option in (w for w in found[number:] if w.startswith("--")):
                    assert f'"{option.partition("=")[0]}"' in script, f"{place}: {option}"
        if found[1:2] == ["-m"] and found[2].startswith("benchmarks"):
            module = ROOT / Path(*found[2].split("."))
            assert module.with_suffix(".py").is_file() or module.is_dir(), f"{place}: {found[2]}"
