"""A LoRA student by PEFT: python examples/peft_lora.py --data rows.jsonl (needs: pip install peft)

The adapter alone is trained and saved.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from sra import SRAConfig, SRATrainer, load_rows

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default=str(Path(__file__).with_name("rows.jsonl")))
parser.add_argument("--output", default="runs/peft_lora")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--rank", type=int, default=16)
args = parser.parse_args()

config = SRAConfig(
    output_dir=args.output,
    recipe="respell",
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
trainer = SRATrainer(
    AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
    AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16),
    config,
    train_dataset=load_rows(args.data),
    processing_class=AutoTokenizer.from_pretrained(args.student),
    teacher_processing_class=AutoTokenizer.from_pretrained(args.teacher),
    peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
)
trainer.distiller.student.print_trainable_parameters()
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']} loss {entry['loss']:.4f}")
trainer.save_model(args.output)  # AutoPeftModelForCausalLM.from_pretrained(args.output) loads it
