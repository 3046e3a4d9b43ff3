"""`sra distill`: train a student from a teacher, or from several."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("distill", help="train a student from a teacher", add_help=False)
    parser.set_defaults(run=run, takes_rest=True)


def run(args: argparse.Namespace) -> int:
    """Its arguments are those of transformers and more, so they are read here, not at start-up."""
    from sra.arguments import help_text, warmup

    if not args.options or {"-h", "--help", "--help-all"} & {*args.options}:
        print(help_text(every="--help-all" in args.options))
        return 0
    given, config = _parsed(args.options)

    from sra.allocator import keep_freed_memory
    from sra.data import load_rows, stream_rows
    from sra.loading import load_model, load_tokenizer
    from sra.model import loaded_whole
    from sra.run_record import check_settings, last_checkpoint, write_record
    from sra.trainer import CHECKED_ROWS, SRATrainer

    if config.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint is for loops of your own. sra distill goes on from the last "
            "whole checkpoint of its --output: pass --resume instead."
        )
    if given.data is None:
        raise ValueError("There is no data: add --data rows.jsonl.")
    needs_teacher = config.objective().needs_teacher
    if needs_teacher and not (given.teacher_model_name_or_path or given.teacher_cache):
        kind = "recipe" if config.method == "sra" else "method"
        raise ValueError(
            f"The {kind} {getattr(config, kind)!r} needs a teacher: sra distill STUDENT TEACHER."
        )
    if given.dataset_streaming:
        if config.max_steps < 0:
            raise ValueError("dataset_streaming: the end is not known, so give --max_steps.")
        train: Any = stream_rows(given.data)  # accelerate shares it out among ranks
    else:
        train = load_rows(given.data)
    if given.default_warmup:
        warmup(config, 0 if given.dataset_streaming else len(train))
    held_out = load_rows(given.eval_data) if given.eval_data else None
    output = Path(str(config.output_dir))
    checkpoint = last_checkpoint(output)
    if checkpoint and not given.resume:
        raise ValueError(
            f"{output} holds a run already ({checkpoint.name}). Go on with --resume, or choose "
            "another --output."
        )
    if not checkpoint and (output / "student").exists():
        raise ValueError(
            f"{output} holds a student already, and no checkpoint to go on from. Choose another "
            "--output."
        )
    if given.resume and not checkpoint:
        print(f"{output} holds no checkpoint yet: starting from the beginning.")
    inputs = _inputs(given, config)
    if config.device.type == "cpu":
        keep_freed_memory()
    if checkpoint:
        check_settings(output, config.to_dict(), inputs)

    student_options = _options(given, given.model_revision)
    teacher_options = _options(given, given.teacher_model_revision)
    names = given.teacher_model_name_or_path
    with loaded_whole(config):
        teachers = _teachers(given, config, teacher_options) if needs_teacher else []
    tokenizers = [load_tokenizer(name, **teacher_options) for name in names] or [
        teacher.tokenizer
        for teacher in teachers  # a cache keeps its teacher's
    ]
    trainer = SRATrainer(
        load_model(
            given.model_name_or_path,
            attn_implementation=given.attn_implementation,
            **student_options,
        ),
        teachers or None,
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=load_tokenizer(given.model_name_or_path, **student_options),
        teacher_processing_class=tokenizers or None,
        teacher_names=given.teacher_names,
        peft_config=_lora(given),
    )
    if trainer.coverage is not None:
        print(f"Spans cover {trainer.coverage:.1%} of the trained texts' bytes.")
    if trainer.left_out:
        print(
            f"{trainer.left_out:,} of the {min(len(train), CHECKED_ROWS):,} rows that were looked "
            f"at are left out: their prompts fill max_length = {config.max_length}."
        )
    if config.should_save:
        write_record(output, inputs=inputs)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _save_student(trainer, output / "student")
    print(f"The student is in {output / 'student'}.")
    if held_out:
        after = trainer.evaluate()["eval_bits_per_byte"]
        print(f"Held-out bits per byte: {after:.4f}")
        if config.should_save:
            write_record(output, after={"bits_per_byte": after})
    print(f"Look at the run: sra report {output}")
    return 0


def _parsed(options: list[str]) -> tuple[Any, Any]:
    """A run that goes on does so in the dtype that was found to be the faster one at its start."""
    from sra.arguments import parse
    from sra.run_record import read_record

    given, config = parse(options)
    if given.resume and given.dtype == "auto":
        begun = read_record(str(config.output_dir)).get("config") or {}
        if not begun.get("fp16") and begun.get("bf16") not in (None, config.bf16):
            dtype = "bfloat16" if begun["bf16"] else "float32"
            return parse([*options, "--dtype", dtype])
    return given, config


def _full(name: Any) -> Any:
    """A file or folder by its full path, what is neither as it is; of a list, each."""
    if isinstance(name, list):
        return [_full(part) for part in name]
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _inputs(given: Any, config: Any) -> dict[str, Any]:
    """Models and data, for the record: files by their full paths."""
    inputs = {
        "student": _full(given.model_name_or_path),
        "teachers": _full(given.teacher_model_name_or_path),
        "teacher_cache": _full(given.teacher_cache),
        "data": _full(given.data),
        "dataset_streaming": given.dataset_streaming,
        "rows_per_step": config.train_batch_size
        * config.gradient_accumulation_steps
        * config.world_size,
    }
    for name in ("model_revision", "teacher_model_revision", "teacher_names", "use_peft"):
        inputs[name] = getattr(given, name)
    if given.use_peft:
        inputs |= {name: value for name, value in vars(given).items() if name.startswith("lora_")}
    if given.dataset_streaming:  # they share the rows out
        inputs["dataloader_num_workers"] = config.dataloader_num_workers
    return inputs


def _save_student(trainer: Any, folder: Path) -> None:
    """The whole student or none: a model that is half there loads too, or nearly."""
    part = folder.with_name("student.part")
    mine = trainer.args.should_save
    if mine:
        shutil.rmtree(part, ignore_errors=True)
    try:
        trainer.save_model(str(part))
    except Exception as error:  # each writer has its own
        shutil.rmtree(part, ignore_errors=True)
        raise RuntimeError(
            f"{folder} could not be written ({error}). The last checkpoint is whole: free some "
            "space and go on with --resume, which only writes the student."
        ) from error
    if mine:
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def _options(given: Any, revision: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": given.trust_remote_code}
    return {**options, "revision": revision} if revision else options


def _teachers(given: Any, config: Any, options: dict[str, Any]) -> list[Any]:
    import torch

    from sra.loading import load_model
    from sra.teacher_cache import DiskCache, TeacherCache

    if given.teacher_cache:
        if given.remember_teacher:
            raise ValueError("remember_teacher: the states come from --teacher-cache already.")
        caches = [DiskCache(folder) for folder in given.teacher_cache]
        for name, cache in zip(given.teacher_model_name_or_path, caches, strict=False):
            held = cache.manifest.teacher
            if _full(name) != _full(held):
                raise ValueError(
                    f"{cache.folder} holds the states of {held}, and {name} is named as the "
                    "teacher. Leave the name out: a cache has its teacher's tokenizer too."
                )
        return caches
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    models = [
        load_model(name, dtype=dtype, attn_implementation=given.attn_implementation, **options)
        for name in given.teacher_model_name_or_path
    ]
    return [TeacherCache(model) for model in models] if given.remember_teacher else models


def _lora(given: Any) -> Any:
    if not given.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=given.lora_r,
        lora_alpha=given.lora_alpha,
        lora_dropout=given.lora_dropout,
        target_modules=given.lora_target_modules,
        task_type="CAUSAL_LM",
    )
