"""Writing a teacher's states into a folder, a shard at a time, by one process at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from torch import Tensor

from sra.chat import TrainTurns, render
from sra.data import check_row
from sra.model import head_of
from sra.states import States
from sra.teacher_cache.cache import check_teacher, dtype_of, revision_of, sequence_states
from sra.teacher_cache.files import (
    DTYPES,
    HEAD,
    MANIFEST,
    TOKENIZER,
    Entry,
    Manifest,
    Shard,
    bytes_per_token,
    contents_of,
    is_cache,
    key_of,
    read_index,
    read_manifest,
    shard_tensors,
    tokenizer_hash,
    write_file,
    write_index,
    write_manifest,
    write_tensors,
)
from sra.token_bytes import byte_tokenizer

LOCK, OWNER = "writer.lock", "writer.json"


class CacheWriter:
    """Adds sequences to a folder, which it makes or goes on with; `DiskCache` reads it.

    >>> with CacheWriter("cache", teacher, tokenizer) as writer:
    ...     for batch in writer.batches(sequences, batch_size=8):
    ...         writer.add(batch)

    A shard is written when it is full, and on leaving, whatever made you leave; a process that is
    killed loses the shard in hand alone.

    Args:
        folder: a cache of the same teacher, tokenizer, dtype and layers; or empty or not there.
        teacher: a causal language model, in the dtype and on the device where it shall compute.
        tokenizer: the teacher's; kept in the folder.
        name: what messages call the teacher.
        dtype: "bfloat16", or "int8" with a float32 scale a row (half the space).
        layers: whose states to keep; negative ones count from the last, -1.
        shard_bytes: of one file; so much is kept in memory before it is written.

    Raises:
        ValueError: another teacher, dtype, layers, tokenizer or format than the folder's; a damaged
            shard (with its name); a folder of something else.
        RuntimeError: another process is writing.
        OSError: no room on the disk.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        dtype: str = "bfloat16",
        layers: Sequence[int] = (-1,),
        shard_bytes: int = 256 << 20,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(map(repr, DTYPES))}, got {dtype!r}.")
        count = teacher.config.get_text_config().num_hidden_layers
        for layer in layers:
            if not -count <= layer < count:
                raise ValueError(f"The teacher has {count} layers; there is no layer {layer}.")
        self.folder = Path(folder)
        self.layers = tuple(sorted({layer % count for layer in layers}))
        self.dtype = dtype
        self._teacher = teacher.eval()
        self._tokenizer = tokenizer
        self._name = name or teacher.config.name_or_path or type(teacher).__name__
        width = head_of(teacher).weight.shape[1]
        self.bytes_per_token = bytes_per_token(width, len(self.layers), dtype)
        self._tokens_per_shard = max(1, shard_bytes // self.bytes_per_token)
        self._lock = FileLock(self.folder / LOCK)
        self.lost: list[Entry] = []  # shards whose files are gone: their texts are lacking again
        self._entries: list[Entry] = []
        self._next_number = 0
        self._keys: set[bytes] = set()
        self._pending: dict[bytes, States] = {}
        self._pending_tokens = 0

    def __enter__(self) -> CacheWriter:
        self._check_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # The system frees it when its process ends, killed or not.
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"{self.folder} is being written by {self._owner()}. Wait for it or stop it; "
                "reading is possible meanwhile."
            ) from None
        try:
            owner = {"pid": os.getpid(), "host": platform.node()}
            write_file(self.folder / OWNER, json.dumps(owner).encode())
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if not (kind and issubclass(kind, OSError)):  # a full disk is full here too
                self.flush()
        finally:
            self._release()

    def batches(self, sequences: Iterable[Tensor], batch_size: int) -> Iterator[list[Tensor]]:
        """The sequences ``[T]`` that the folder lacks, each once, those of like length together."""
        lacking = {key: ids for ids in sequences if (key := key_of(ids)) not in self._keys}
        order = sorted(lacking.values(), key=len, reverse=True)  # the largest batch runs first
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def add(self, sequences: Sequence[Tensor]) -> None:
        """Let the teacher read sequences of token ids ``[T]`` as one batch, and keep its states."""
        lacking = {key_of(ids): ids for ids in sequences}
        lacking = {
            key: ids
            for key, ids in lacking.items()
            if key not in self._keys and key not in self._pending
        }
        rows = sequence_states(self._teacher, [*lacking.values()], self.layers)
        for (key, ids), row in zip(lacking.items(), rows, strict=True):
            if not all(bool(torch.isfinite(x).all()) for x in (*row.hidden, *row.mass)):
                raise ValueError(
                    f"{self._name} gives states that are not finite for a text of {len(ids)} "
                    f"tokens: {self._tokenizer.decode(ids.tolist())!r:.60}... Run it in float32, "
                    "or drop the text."
                )
            self._pending[key] = row
            self._pending_tokens += len(ids)
        if self._pending_tokens >= self._tokens_per_shard:
            self.flush()

    def flush(self) -> None:
        """Write what is in hand as a shard."""
        if not self._pending:
            return
        file = f"shard-{self._next_number:05d}.safetensors"
        tensors = shard_tensors(
            [*self._pending], [*self._pending.values()], self.layers, self.dtype
        )
        size, digest = write_tensors(self.folder / file, tensors)
        contents = contents_of(tensors["keys"], tensors["offsets"])
        entry = Entry(file, size, digest, contents, len(self._pending), self._pending_tokens)
        write_index(self.folder, [*self._entries, entry])
        self._entries.append(entry)
        self._next_number += 1
        self._keys.update(self._pending)
        self._pending, self._pending_tokens = {}, 0

    def check_room(self, sequences: Iterable[Tensor]) -> None:
        """Raise OSError if the states of these sequences do not fit on the disk."""
        needed = sum(map(len, sequences)) * self.bytes_per_token
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"The states need {needed / 1e9:.1f} GB in {self.folder}, where "
                f"{free / 1e9:.1f} GB are free. Free some space, choose another disk with --out, "
                "or take --dtype int8."
            )

    def _check_folder(self) -> None:
        if not self.folder.exists() or is_cache(self.folder):
            return
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file. Choose a folder for the states.")
        ours = {HEAD, TOKENIZER, LOCK, OWNER}  # what a writer leaves that was killed early
        others = sorted(path.name for path in self.folder.iterdir())
        others = [name for name in others if name.removesuffix(".tmp") not in {*ours, MANIFEST}]
        if others:
            raise ValueError(
                f"{self.folder} holds other things ({', '.join(others[:3])}) and no {MANIFEST}. "
                "Choose an empty folder."
            )

    def _open(self) -> None:
        for scratch in self.folder.glob("*.tmp"):  # of a writer that was killed
            scratch.unlink()
        tokenizer = tokenizer_hash(self._tokenizer)
        if is_cache(self.folder):
            manifest = read_manifest(self.folder)
            self._check(manifest, tokenizer)
            if not (self.folder / HEAD).exists():
                write_manifest(self.folder, dataclasses.replace(manifest, head=self._write_head()))
            listed = read_index(self.folder)
            self.lost = [entry for entry in listed if not (self.folder / entry.file).exists()]
            self._entries = [entry for entry in listed if entry not in self.lost]
            self._next_number = max((entry.number for entry in listed), default=-1) + 1
            for entry in self._entries:
                self._keys.update(Shard(self.folder, entry, verify=False).keys)
            return
        head = head_of(self._teacher)
        config = self._teacher.config.get_text_config()
        self._tokenizer.save_pretrained(self.folder / TOKENIZER)
        write_manifest(
            self.folder,
            Manifest(
                teacher=self._name,
                revision=revision_of(self._teacher),
                tokenizer=tokenizer,
                hidden_size=head.weight.shape[1],
                num_hidden_layers=config.num_hidden_layers,
                layers=self.layers,
                dtype=self.dtype,
                model_dtype=dtype_of(self._teacher),
                head=self._write_head(),
                logit_scale=head.scale,
                final_logit_softcapping=head.softcap,
                transformers=transformers.__version__,
            ),
        )

    def _check(self, manifest: Manifest, tokenizer: str) -> None:
        """Raise ValueError unless what is added is like what the folder holds."""
        for what, held, given in (
            ("dtype", manifest.dtype, self.dtype),
            ("layers", manifest.layers, self.layers),
        ):
            if held != given:
                raise ValueError(
                    f"{self.folder} holds {what} {_listed(held)}, and {_listed(given)} is asked "
                    f"for. Go on with --{what} {_listed(held, ' ')}, or write another folder."
                )
        if manifest.tokenizer != tokenizer:
            raise ValueError(
                f"{self.folder} holds states of {manifest.teacher}, and {self._name} has another "
                f"tokenizer or chat template. Use the one in {self.folder / TOKENIZER}, or write "
                "another folder."
            )
        check_teacher(self.folder, manifest, self._teacher)

    def _write_head(self) -> str:
        head = head_of(self._teacher)
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return write_tensors(self.folder / HEAD, tensors)[1]

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / OWNER).read_text())
        except (OSError, ValueError):
            return "another process"
        return f"process {owner['pid']} on {owner['host']}"

    def _release(self) -> None:
        (self.folder / OWNER).unlink(missing_ok=True)
        self._lock.release()


def teacher_sequences(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 512,
    chat_template: bool = True,
    train_turns: TrainTurns = "assistant",
) -> list[Tensor]:
    """The token ids ``[T]`` of each row as `SpanCollator`, with the same settings, gives them to
    the teacher; int32.

    Raises:
        ValueError: a row that cannot be written for the teacher, with its number.
    """
    encode = byte_tokenizer(tokenizer)
    sequences = []
    for number, row in enumerate(rows):
        check_row(row, f"Row {number}")
        try:
            text = render(tokenizer, row, chat_template=chat_template, train_turns=train_turns).text
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        ids = encode(text, add_special_tokens=False).ids[:max_length]
        sequences.append(torch.from_numpy(ids.astype("int32")))
    return sequences


def _listed(value: Any, between: str = ", ") -> str:
    return value if isinstance(value, str) else between.join(map(str, value))
