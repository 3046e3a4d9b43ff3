"""Models and tokenizers by their names, and what is wrong with one that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sra.packages import MODELS, Log, fetch_model


def resolve_model(
    name_or_path: str | Path,
    *,
    trust_remote_code: bool = False,
    log: Log = print,
    **options: Any,
) -> str:
    """What ``from_pretrained`` takes, for a name of ``MODELS``, a checkpoint folder (of a PEFT
    adapter too) or a hub id.

    A model that cannot be read is found here, before a run writes anything: the configuration is
    loaded, and the header of each local safetensors file is read (a truncated file fails there).

    Args:
        trust_remote_code: run code that comes with the model. Never asked for at the terminal.
        options: of `from_pretrained`: revision.

    Raises:
        ValueError: not a published name, not a folder with a readable checkpoint, and not a hub id
            that can be reached; the message gives the reason.
    """
    name = str(name_or_path)
    if name in MODELS:
        return str(fetch_model(name, log=log))
    from safetensors import SafetensorError, safe_open

    folder = Path(name).expanduser()
    if folder.is_dir():
        for weights in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(
                    f"Cannot read {weights}: {error}. The file is damaged: copy the model again."
                ) from error
        name = str(folder)
        if base := _adapted(folder):  # its model is what must be readable
            resolve_model(base, trust_remote_code=trust_remote_code, log=log)
            return name
    try:
        load_config(name, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        where = "" if folder.is_dir() else "no such folder, and as a hub id: "
        if "custom code" in reason and not trust_remote_code:
            raise ValueError(
                f"{name} has code of its own, which is not run unless you trust it. If you do: "
                "--trust-remote-code, or trust_remote_code=True."
            ) from error
        raise ValueError(
            f"Cannot read the model {name!r}: {where}{reason}\nGive a folder that "
            "save_pretrained wrote, a hub id that this machine can reach, or one of "
            f"{', '.join(MODELS)}."
        ) from error
    return name


def _adapted(folder: Path) -> str | None:
    """The model that a folder's PEFT adapter changes; None if the folder holds no adapter."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        return None
    return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]


def load_config(name: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The configuration of what `resolve_model` returns; of an adapter, that of its model."""
    from transformers import AutoConfig

    base = _adapted(Path(name))
    return AutoConfig.from_pretrained(
        resolve_model(base) if base else name, trust_remote_code=trust_remote_code, **options
    )


def load_tokenizer(
    name_or_path: str | Path, *, trust_remote_code: bool = False, **options: Any
) -> Any:
    """The tokenizer of what `resolve_model` takes, with its arguments."""
    from transformers import AutoTokenizer

    options["trust_remote_code"] = trust_remote_code
    return AutoTokenizer.from_pretrained(resolve_model(name_or_path, **options), **options)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: Any | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """The causal language model of what `resolve_model` takes.

    Args:
        dtype: of its weights (None: float32, in which a student is trained). One that is smaller
            needs less memory from the start, which casting afterwards does not.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ... (None: transformers').
        trust_remote_code, options: as of `resolve_model`. Weights are read from safetensors files
            alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options["trust_remote_code"] = trust_remote_code
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(name_or_path, **options),
        dtype=dtype or torch.float32,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        **options,
    )
