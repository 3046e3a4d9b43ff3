"""The folder in which a teacher's states lie: its files, and what is checked before they are used.

    cache.json            what the states are of, and how they are stored (`Manifest`)
    head.safetensors      the teacher's output layer
    tokenizer/            its tokenizer and chat template
    index.json            every shard with its size and sha256 (`Entry`)
    shard-00000.safetensors
        keys [R, 32] uint8      sha256 of the token ids of each of R sequences
        offsets [R + 1] int64   where each begins in the N rows below
        mass.L [N] float32      attention mass, for each stored layer L
        hidden.L [N, D]         states, bfloat16; or int8 with scale.L [N] float32: hidden * scale

A file appears by one rename, when it is complete.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sra.states import States
from sra.whole_file import write_whole

FORMAT = 1
MANIFEST, INDEX, HEAD, TOKENIZER = "cache.json", "index.json", "head.safetensors", "tokenizer"
DTYPES = ("bfloat16", "int8")


@dataclass(frozen=True)
class Manifest:
    """What a folder's states are of.

    revision: sha256 of the teacher's parameters and configuration.
    tokenizer: sha256 of its tokenizer and chat template.
    layers: the stored ones, counted from 0.
    dtype: of the stored states; model_dtype: in which the teacher computed them.
    head: sha256 of the file of the output layer.
    """

    teacher: str
    revision: str
    tokenizer: str
    hidden_size: int
    num_hidden_layers: int
    layers: tuple[int, ...]
    dtype: str
    model_dtype: str
    head: str
    logit_scale: float | None
    final_logit_softcapping: float | None
    transformers: str
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """One shard, as the index lists it.

    sha256: of the file; contents: of its keys and offsets, which are read of every shard.
    """

    file: str
    bytes: int
    sha256: str
    contents: str
    rows: int
    tokens: int

    @property
    def number(self) -> int:
        return int(self.file[6:11])


def key_of(ids: Tensor) -> bytes:
    """The name of one sequence: sha256 of its token ids, whatever their dtype and device."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).digest()


def is_cache(folder: str | Path) -> bool:
    """Whether `sra cache` has begun to write `folder`."""
    return (Path(folder) / MANIFEST).is_file()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of a fast tokenizer, its special tokens and its chat template."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core |= {"padding": None, "truncation": None}  # set by the last call, not by the model
    whole = [core, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises FileNotFoundError, ValueError: no cache, or one that this version cannot read."""
    if not is_cache(folder):
        raise FileNotFoundError(
            f"{folder} holds no teacher cache (no {MANIFEST}). Make one: "
            f"sra cache TEACHER --data DATA.jsonl --out {folder}"
        )
    fields = _read_json(folder / MANIFEST)
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has cache format {fields.get('format')}, and this version of sra reads "
            f"format {FORMAT}. Install the sra that wrote it, or write another folder with "
            "sra cache."
        )
    return Manifest(**{**fields, "layers": tuple(fields["layers"])})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    _write_json(folder / MANIFEST, dataclasses.asdict(manifest))


def read_index(folder: Path) -> list[Entry]:
    """The shards of a folder; none before the first is complete.

    Raises:
        ValueError: the index is damaged, or names a file that is no shard of this folder.
    """
    path = folder / INDEX
    entries = [Entry(**entry) for entry in _read_json(path)] if path.exists() else []
    for entry in entries:
        if not re.fullmatch(r"shard-[0-9]{5,}\.safetensors", entry.file):
            raise ValueError(
                f"{path} is damaged: it names the file {entry.file!r}, which is no shard of this "
                "folder. Write the cache anew, in another folder."
            )
    return entries


def write_index(folder: Path, entries: Sequence[Entry]) -> None:
    _write_json(folder / INDEX, [dataclasses.asdict(entry) for entry in entries])


def check_size(folder: Path, entry: Entry) -> None:
    """Raise FileNotFoundError or ValueError, with the file, if it is not as long as it was."""
    path = folder / entry.file
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, and {INDEX} lists it. Run sra cache again with the data of this "
            f"folder: it computes its {entry.rows} sequences anew."
        )
    size = path.stat().st_size
    if size != entry.bytes:
        raise ValueError(_damaged(path, f"it has {size:,} bytes instead of {entry.bytes:,}"))


class Shard:
    """One shard, memory-mapped: only the rows that are asked for are read.

    Args:
        verify: compare the file's sha256 with the index, which reads it once as a whole.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, with its name.
    """

    def __init__(self, folder: Path, entry: Entry, *, verify: bool) -> None:
        check_size(folder, entry)
        path = folder / entry.file
        if verify and sha256_of(path) != entry.sha256:
            raise ValueError(_damaged(path, "its sha256 is not the one in the index"))
        try:
            self._file = safe_open(path, framework="pt")
            self._names = set(self._file.keys())
            keys, offsets = (self._file.get_tensor(name) for name in ("keys", "offsets"))
        except (SafetensorError, OSError) as error:
            raise ValueError(_damaged(path, str(error))) from error
        if contents_of(keys, offsets) != entry.contents:
            raise ValueError(_damaged(path, "its keys are not those of the index"))
        self.keys = [row.tobytes() for row in keys.numpy()]
        self._offsets = offsets.tolist()

    def row(self, i: int, layers: Sequence[int], dtype: torch.dtype) -> States:
        """Hidden states ``[T, D]`` and masses ``[T]`` of the shard's sequence `i`."""
        rows = slice(self._offsets[i], self._offsets[i + 1])
        hidden, mass = [], []
        for layer in layers:
            states = self._file.get_slice(f"hidden.{layer}")[rows]
            if f"scale.{layer}" in self._names:
                scale = self._file.get_slice(f"scale.{layer}")[rows]
                states = states.float() * scale[:, None]
            hidden.append(states.to(dtype))
            mass.append(self._file.get_slice(f"mass.{layer}")[rows])
        return States(tuple(hidden), tuple(mass))


def contents_of(keys: Tensor, offsets: Tensor) -> str:
    """sha256 of which sequences a shard holds."""
    return hashlib.sha256(keys.numpy().tobytes() + offsets.numpy().tobytes()).hexdigest()


def shard_tensors(
    keys: Sequence[bytes], rows: Sequence[States], layers: Sequence[int], dtype: str
) -> dict[str, Tensor]:
    """A shard's contents, out of the states ``[T, D]`` and masses ``[T]`` of its sequences."""
    lengths = [len(row.mass[0]) for row in rows]
    out = {
        "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32).copy()),
        "offsets": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64)),
    }
    for i, layer in enumerate(layers):
        hidden = torch.cat([row.hidden[i] for row in rows])
        out[f"mass.{layer}"] = torch.cat([row.mass[i] for row in rows]).float()
        if dtype == "int8":
            hidden, out[f"scale.{layer}"] = quantise(hidden)
        out[f"hidden.{layer}"] = hidden if dtype == "int8" else hidden.bfloat16()
    return out


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, D]`` as int8 and a float32 scale ``[N]``: the largest of each row becomes 127."""
    hidden = hidden.float()
    scale = hidden.abs().amax(1) / 127
    return (hidden / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def bytes_per_token(hidden_size: int, layers: int, dtype: str) -> int:
    """What a token takes: its states, their scale if they are int8, and its mass."""
    return layers * ({"bfloat16": 2 * hidden_size, "int8": hidden_size + 4}[dtype] + 4)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file; returns its bytes and sha256. Raises OSError if it does not fit."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_file(path, data)
    return len(data), hashlib.sha256(data).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """The whole file or none of it, even if the machine stops.

    Raises:
        OSError: what it is, and that what is complete stays; a full disk also says how to go on.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"No room for {path} ({len(data):,} bytes). What was complete before it is kept: "
                "free some space and run sra cache again, which goes on from there. "
                "--dtype int8 needs half of bfloat16's space, in another folder",
            ) from error
        raise


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} is damaged: {reason}. Delete that file and run sra cache again with the data of "
        "this folder: it computes those sequences anew."
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}. Write the cache anew, in another folder."
        ) from error


def _write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())
