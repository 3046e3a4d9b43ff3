"""SRATrainer on a tiny pair, and what a run of it leaves."""

from __future__ import annotations

import torch
from transformers.trainer_callback import PrinterCallback

from sra import SRAConfig, SRATrainer
from tests import tiny


def trainer(folder, *, dtype=torch.float32, teacher=None, rows=tiny.ROWS, **options):
    options = {
        "recipe": "paper",
        "gamma": 1.0,
        "outside": "weight",
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "projector_learning_rate": 6e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 3,
    } | options
    cross_entropy = options["recipe"] == "cross-entropy"
    made = SRATrainer(
        tiny.student_model(dtype),
        None if cross_entropy else teacher or tiny.teacher_model(dtype),
        SRAConfig(output_dir=str(folder), **options),
        train_dataset=rows,
        eval_dataset=tiny.ROWS[:4],
        processing_class=tiny.student_tokenizer(),
        teacher_processing_class=tiny.teacher_tokenizer(),
    )
    made.pop_callback(PrinterCallback)
    return made


def weights(run):
    return {name: p.detach().clone() for name, p in run.distiller.named_parameters()}


def logged(run, key):
    return [log[key] for log in run.state.log_history if key in log]
