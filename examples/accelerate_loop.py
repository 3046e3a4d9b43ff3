"""A loop with Accelerate: accelerate launch examples/accelerate_loop.py --data rows.jsonl"""

import argparse
import itertools
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import sra

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default=str(Path(__file__).with_name("rows.jsonl")))
parser.add_argument("--output", default="runs/accelerate_loop")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--learning-rate", type=float, default=3e-4)
args = parser.parse_args()

accelerator = Accelerator()  # steps are counted below, so it is told of no accumulation
torch.manual_seed(0)
student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16)
student_tokenizer = AutoTokenizer.from_pretrained(args.student)
teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher)
vocabulary = sra.SharedVocabulary(student_tokenizer, teacher_tokenizer, match="normalised")
distiller = sra.SpanDistiller(
    student, teacher.to(accelerator.device), sra.recipe("respell"), vocabulary=vocabulary
)
collator = sra.SpanCollator(sra.SpanAligner(student_tokenizer, teacher_tokenizer), max_length=512)
loader = DataLoader(sra.load_rows(args.data), args.batch_size, shuffle=True, collate_fn=collator)
optimizer = torch.optim.AdamW(distiller.parameters(), lr=args.learning_rate)
distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)

distiller.train()
for epoch in range(args.epochs):
    batches = iter(loader)
    while micro_batches := list(itertools.islice(batches, args.accumulate)):
        # What sums are divided by: the tokens, sequences and spans of the whole step, all ranks.
        counts = accelerator.reduce(sra.count_items(micro_batches).to(accelerator.device), "sum")
        total = 0.0
        for batch in micro_batches:
            loss = distiller(**batch, num_items_in_batch=counts).loss
            accelerator.backward(loss * accelerator.num_processes)  # ranks are averaged
            total += loss.item()
        accelerator.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"epoch {epoch} loss {total:.4f}")

if accelerator.is_main_process:
    accelerator.unwrap_model(distiller).save_pretrained(args.output)  # the plain student
    student_tokenizer.save_pretrained(args.output)
