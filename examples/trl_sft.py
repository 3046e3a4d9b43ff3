"""TRL's SFTTrainer: python examples/trl_sft.py --data rows.jsonl (needs: pip install trl)"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from sra import SharedVocabulary, SpanAligner, SpanCollator, SpanDistiller, load_rows, recipe
from sra.trl import SpanSFTTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default=str(Path(__file__).with_name("rows.jsonl")))
parser.add_argument("--output", default="runs/trl_sft")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=3e-4)
args = parser.parse_args()

torch.manual_seed(0)
on_gpu = torch.cuda.is_available()
student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16)
student_tokenizer = AutoTokenizer.from_pretrained(args.student)
teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher)

config = SFTConfig(
    output_dir=args.output,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.learning_rate,
    dataset_kwargs={"skip_prepare_dataset": True},  # the collator reads the text
    remove_unused_columns=False,
    bf16=on_gpu,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
trainer = SpanSFTTrainer(
    SpanDistiller(
        student,
        teacher.to(config.device),
        recipe("respell"),
        vocabulary=SharedVocabulary(student_tokenizer, teacher_tokenizer, match="normalised"),
    ),
    config,
    train_dataset=Dataset.from_list(load_rows(args.data)),
    data_collator=SpanCollator(SpanAligner(student_tokenizer, teacher_tokenizer)),
    processing_class=student_tokenizer,
)
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']} loss {entry['loss']:.4f}")
trainer.save_model(args.output)  # the plain student, its tokenizer and the projector
