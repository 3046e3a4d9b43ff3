"""TRL's on-policy GOLDTrainer with exact spans: python examples/gold.py (needs: pip install trl)"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from sra import load_rows
from sra.trl import SpanULDLoss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default=str(Path(__file__).with_name("rows.jsonl")))
parser.add_argument("--output", default="runs/gold")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--on-policy", type=float, default=0.5, help="share of the student's own text")
parser.add_argument("--new-tokens", type=int, default=64)
args = parser.parse_args()

config = GOLDConfig(
    output_dir=args.output,
    use_uld_loss=True,
    use_extended_uld=False,  # TRL's own alignment, which takes byte-level BPE alone
    teacher_tokenizer_name_or_path=args.teacher,
    beta=0.0,  # forward KL
    lmbda=args.on_policy,
    max_completion_length=args.new_tokens,
    max_length=4 * args.new_tokens,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    bf16=torch.cuda.is_available(),
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
tokenizer = AutoTokenizer.from_pretrained(args.student)
trainer = GOLDTrainer(
    AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32),
    AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16),
    config,
    train_dataset=Dataset.from_list(load_rows(args.data)),
    processing_class=tokenizer,
)
trainer.uld_loss_fn = SpanULDLoss.for_trainer(trainer)
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']} loss {entry['loss']:.4f}")
trainer.save_model(args.output)
