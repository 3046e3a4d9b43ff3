"""The transformers Trainer: python examples/transformers_trainer.py --data rows.jsonl

SRATrainer is a Trainer; every argument of TrainingArguments is one of SRAConfig too.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sra import SRAConfig, SRATrainer, load_rows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default=str(Path(__file__).with_name("rows.jsonl")))
parser.add_argument("--output", default="runs/transformers_trainer")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=3e-4)
args = parser.parse_args()

rows = load_rows(args.data)
config = SRAConfig(
    output_dir=args.output,
    recipe="respell",
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    logging_steps=1,
    eval_strategy="epoch",
    save_strategy="no",
    report_to="none",
)
trainer = SRATrainer(
    AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
    AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16),
    config,
    train_dataset=rows,
    eval_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(args.student),
    teacher_processing_class=AutoTokenizer.from_pretrained(args.teacher),
)
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']} loss {entry['loss']:.4f}")
trainer.save_model(args.output)  # the plain student, its tokenizer and the projector
