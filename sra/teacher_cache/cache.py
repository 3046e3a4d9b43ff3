"""Teacher states that are computed once for each text and then looked up, in memory or on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PretrainedConfig

from sra.batch import sequence_rows
from sra.model import head_of
from sra.states import States, model_states
from sra.teacher_cache.files import (
    HEAD,
    TOKENIZER,
    Manifest,
    Shard,
    key_of,
    read_index,
    read_manifest,
    sha256_of,
    tokenizer_hash,
)


class _Remembered(ABC):
    """The part of a teacher that `SpanDistiller` asks for states."""

    config: Any
    dtype: torch.dtype

    @property
    def name_or_path(self) -> str:
        """The teacher's."""
        return self.config.name_or_path

    @abstractmethod
    def get_output_embeddings(self) -> Any: ...

    @abstractmethod
    def _rows(self, sequences: Sequence[Tensor], layers: Sequence[int], mass: bool) -> list[States]:
        """States ``[T, D]`` and masses ``[T]`` of each sequence of ids, in main memory."""

    @torch.no_grad()
    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        layers: Sequence[int] = (-1,),
        mass: bool = True,
    ) -> States:
        """As `sra.states.model_states`; padding rows are zero.

        A sequence is known by its ids alone, so padding, order and packing do not matter.
        """
        where = sequence_rows(input_ids, attention_mask, position_ids)
        ids = input_ids.flatten().cpu()
        count = self.config.get_text_config().num_hidden_layers
        chosen = [i + count if i < 0 else i for i in layers]
        rows = self._rows([ids[at] for at in where], chosen, mass)
        if rows:
            like = rows[0]
        else:  # a batch that routes no row here
            width = head_of(self).weight.shape[1]
            like = States((torch.empty(0, width, dtype=self.dtype),), (torch.empty(0),))

        def whole(parts: list[Tensor], like: Tensor) -> Tensor:
            """The batch, with each sequence's part in its place."""
            out = like.new_zeros(len(ids), *like.shape[1:])
            for at, part in zip(where, parts, strict=True):
                out[at] = part
            return out.view(*input_ids.shape, *like.shape[1:]).to(input_ids.device)

        each = range(len(layers))
        hidden = [whole([row.hidden[i] for row in rows], like.hidden[0]) for i in each]
        masses = [whole([row.mass[i] for row in rows], like.mass[0]) for i in each if mass]
        return States(tuple(hidden), tuple(masses))


class TeacherCache(_Remembered):
    """A teacher that remembers, in memory: pass it to `SpanDistiller` in the teacher's place.

    Keeps the post-final-norm states of each token sequence that it has seen, and the attention
    masses if they were asked for, not logits, in main memory: 2 * hidden_size + 4 bytes a token in
    bf16. Worth it from the second epoch on. `DiskCache` keeps them between runs.
    """

    def __init__(self, teacher: Any) -> None:
        self._model = teacher.eval().requires_grad_(False)
        self._seen: dict[tuple[bytes, int], tuple[Tensor, Tensor | None]] = {}
        self.config = teacher.config
        self.dtype = head_of(teacher).weight.dtype

    def get_output_embeddings(self) -> Any:
        return self._model.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self._model.get_input_embeddings()

    def to(self, device: torch.device | str) -> TeacherCache:
        """Move the model; what is remembered stays in main memory."""
        self._model.to(device)
        return self

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for row in self._seen.values() for x in row if x is not None)

    def _lacks(self, key: bytes, layer: int, mass: bool) -> bool:
        seen = self._seen.get((key, layer))
        return seen is None or (mass and seen[1] is None)

    def _rows(self, sequences: Sequence[Tensor], layers: Sequence[int], mass: bool) -> list[States]:
        keys = [key_of(ids) for ids in sequences]
        missing = {
            key: ids
            for key, ids in zip(keys, sequences, strict=True)
            if any(self._lacks(key, layer, mass) for layer in layers)
        }
        computed = sequence_states(self._model, [*missing.values()], layers, mass)
        for key, row in zip(missing, computed, strict=True):
            for i, layer in enumerate(layers):
                self._seen[key, layer] = row.hidden[i], row.mass[i] if mass else None
        found = [[self._seen[key, layer] for layer in layers] for key in keys]
        return [
            States(tuple(h for h, _ in row), tuple(m for _, m in row if m is not None))
            for row in found
        ]


class DiskCache(_Remembered):
    """A teacher whose states lie in a folder that `sra cache` wrote; no model is needed.

    Pass it to `SpanDistiller` in the teacher's place. Any number of processes may read one folder,
    also while it grows: what is added later is seen when it is opened again.

    Args:
        folder: with ``cache.json`` in it.
        teacher: the model, for texts that the folder lacks; its answers are not kept. None: such a
            text is an error.
        verify: compare each shard's sha256 with the index when it is first used.

    Raises:
        FileNotFoundError, ValueError: no cache, one of another format, a missing or damaged file
            (with its name), or `teacher` is not the model that the states are of.
    """

    def __init__(self, folder: str | Path, teacher: Any = None, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = read_manifest(self.folder)
        self.dtype = getattr(torch, manifest.model_dtype)
        self.config = PretrainedConfig.from_dict(
            {
                "name_or_path": manifest.teacher,
                "hidden_size": manifest.hidden_size,
                "num_hidden_layers": manifest.num_hidden_layers,
                "logit_scale": manifest.logit_scale,
                "final_logit_softcapping": manifest.final_logit_softcapping,
            }
        )
        self._verify = verify
        self._entries = read_index(self.folder)
        self._open: dict[int, Shard] = {}
        self._places: dict[bytes, tuple[int, int]] = {}
        for number, entry in enumerate(self._entries):
            # Sizes of all now, contents of each when it is used.
            keys = Shard(self.folder, entry, verify=False).keys
            self._places.update({key: (number, i) for i, key in enumerate(keys)})
        self._head = _load_head(self.folder, manifest)
        self._teacher = None
        if teacher is not None:
            check_teacher(self.folder, manifest, teacher)
            self._teacher = teacher.eval().requires_grad_(False)

    def get_output_embeddings(self) -> nn.Linear:
        return self._head

    def to(self, device: torch.device | str) -> DiskCache:
        """Move the output layer, and the model where one was given."""
        self._head.to(device)
        if self._teacher is not None:
            self._teacher.to(device)
        return self

    def __len__(self) -> int:
        """Sequences in the folder."""
        return len(self._places)

    def __contains__(self, ids: Any) -> bool:
        """Whether the folder holds the sequence of these token ids ``[T]``."""
        return key_of(torch.as_tensor(ids)) in self._places

    def check(self, sequences: Sequence[Tensor]) -> None:
        """Raise ValueError if it cannot answer for one of these sequences of ids ``[T]``.

        Before training, with `sra.teacher_cache.writer.teacher_sequences` of the rows.
        """
        lacking = [ids for ids in sequences if ids not in self]
        if not lacking or self._teacher is not None:
            return
        ids = lacking[0].tolist()
        try:
            text = self.tokenizer.decode(ids)
        except (OSError, ValueError):  # the lack is what matters
            text = str(ids)
        raise ValueError(
            f"{self.folder} lacks {len(lacking)} of {len(sequences)} texts. The first has "
            f"{len(ids)} tokens: {text!r:.60}... Add them with sra cache (same data, max_length "
            "and chat template as in training), or pass the model too: DiskCache(folder, teacher)."
        )

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise ValueError unless it holds the states of these layers; negative ones count from
        the last, -1."""
        stored = self.manifest.layers
        count = self.config.get_text_config().num_hidden_layers
        for layer in layers:
            if layer % count not in stored:
                raise ValueError(
                    f"{self.folder} holds layers {', '.join(map(str, stored))} of "
                    f"{self.manifest.teacher}, and layer {layer} is asked for. Ask for a stored "
                    f"one, or write another folder: sra cache ... --layers {layer}"
                )

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of the shards."""
        return sum(entry.bytes for entry in self._entries)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The teacher's, with its chat template, from the folder.

        Raises:
            ValueError: it does not load as the one that wrote the texts.
        """
        tokenizer = AutoTokenizer.from_pretrained(self.folder / TOKENIZER, trust_remote_code=False)
        if tokenizer_hash(tokenizer) != self.manifest.tokenizer:
            raise ValueError(
                f"{self.folder / TOKENIZER} loads as another tokenizer than the one that wrote the "
                f"texts (with transformers {self.manifest.transformers}). Load that of "
                f"{self.manifest.teacher}."
            )
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the shards for itself."""
        return {**self.__dict__, "_open": {}}

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            self._open[number] = Shard(self.folder, self._entries[number], verify=self._verify)
        return self._open[number]

    def _rows(self, sequences: Sequence[Tensor], layers: Sequence[int], mass: bool) -> list[States]:
        self.check_layers(layers)
        self.check(sequences)
        places = [self._places.get(key_of(ids)) for ids in sequences]
        missing = [i for i, place in enumerate(places) if place is None]
        computed = iter(
            sequence_states(self._teacher, [sequences[i] for i in missing], layers, mass)
            if missing
            else ()
        )
        return [
            next(computed)
            if place is None
            else self._shard(place[0]).row(place[1], layers, self.dtype)
            for place in places
        ]


def check_caches(
    teachers: Sequence[Any], collator: Any, rows: Iterable[Mapping[str, Any]], layers: Sequence[int]
) -> None:
    """Raise ValueError unless those teachers that are on disk hold the states that training on
    these rows reads."""
    caches = {k: teacher for k, teacher in enumerate(teachers) if isinstance(teacher, DiskCache)}
    for cache in caches.values():
        cache.check_layers(layers)
    if not caches:
        return
    sequences: dict[int, list[Tensor]] = {k: [] for k in caches}
    for number, row in enumerate(rows):
        for k, table in collator.example(row, f"Row {number}").tables.items():
            if k in caches:
                sequences[k].append(torch.from_numpy(table.teacher_ids))
    for k, cache in caches.items():
        cache.check(sequences[k])


@torch.no_grad()
def sequence_states(
    model: Any, sequences: Sequence[Tensor], layers: Sequence[int], mass: bool = True
) -> list[States]:
    """Run a model on sequences of ids as one batch; states ``[T, D]`` and masses ``[T]`` of each,
    in main memory."""
    if not sequences:
        return []
    device = next(model.parameters()).device
    ids = pad_sequence([x.long() for x in sequences], batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(x) for x in sequences], batch_first=True).to(device)
    states = model_states(model, ids, mask, layers=layers, mass=mass)
    hidden, masses = ([x.cpu() for x in part] for part in states)
    return [
        States(
            # A copy, so that a short row does not keep its whole batch in memory.
            tuple(x[i, : len(row)].clone() for x in hidden),
            tuple(x[i, : len(row)].clone() for x in masses),
        )
        for i, row in enumerate(sequences)
    ]


def revision_of(model: Any) -> str:
    """sha256 of a model's configuration and parameters, in the dtype that they have now."""
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy())
    return digest.hexdigest()


def check_teacher(folder: Path, manifest: Manifest, teacher: Any) -> None:
    """Raise ValueError unless the states of a folder are of this very model."""
    dtype = dtype_of(teacher)
    if dtype != manifest.model_dtype:
        raise ValueError(
            f"The states in {folder} are of {manifest.teacher} in {manifest.model_dtype}, and this "
            f"teacher is in {dtype}. Load it with dtype={manifest.model_dtype}, or write another "
            "folder."
        )
    if revision_of(teacher) != manifest.revision:
        raise ValueError(
            f"{folder} holds states of another teacher: of {manifest.teacher}, revision "
            f"{manifest.revision[:12]} (written with transformers {manifest.transformers}). Its "
            "weights or its configuration are not this model's. Use that teacher, or write another "
            "folder."
        )


def dtype_of(model: Any) -> str:
    """Of the parameters, as torch names it: "bfloat16"."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _load_head(folder: Path, manifest: Manifest) -> nn.Linear:
    path = folder / HEAD
    if not path.exists() or sha256_of(path) != manifest.head:
        raise ValueError(
            f"{path}, the teacher's output layer, is missing or damaged. Delete it and run sra "
            "cache again, which writes it anew."
        )
    tensors = load_file(path)
    rows, width = tensors["weight"].shape
    layer = nn.Linear(width, rows, bias="bias" in tensors, device="meta")
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False)


VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes while the model stays the same."""
    return {
        str(name): _lasting(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in VOLATILE
    }
