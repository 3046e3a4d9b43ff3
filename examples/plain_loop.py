"""A plain PyTorch loop: python examples/plain_loop.py --data rows.jsonl"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from sra import SharedVocabulary, SpanAligner, SpanCollator, SpanDistiller, load_rows, recipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default=str(Path(__file__).with_name("rows.jsonl")))
parser.add_argument("--output", default="runs/plain_loop")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=3e-4)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).to(device)
student_tokenizer = AutoTokenizer.from_pretrained(args.student)
teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher)

distiller = SpanDistiller(
    student,
    teacher,
    recipe("respell"),
    vocabulary=SharedVocabulary(student_tokenizer, teacher_tokenizer, match="normalised"),
)
collator = SpanCollator(SpanAligner(student_tokenizer, teacher_tokenizer), max_length=512)
loader = DataLoader(
    load_rows(args.data), batch_size=args.batch_size, shuffle=True, collate_fn=collator
)
optimizer = torch.optim.AdamW(distiller.parameters(), lr=args.learning_rate)


def to_device(batch):
    """Batches hold tensors, and under "teachers" a list of dictionaries of tensors."""
    if isinstance(batch, list):
        return [to_device(one) for one in batch]
    return {k: to_device(v) if isinstance(v, list) else v.to(device) for k, v in batch.items()}


distiller.train()
for epoch in range(args.epochs):
    for batch in loader:
        out = distiller(**to_device(batch))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch} loss {out.loss:.4f} bits per byte {out.bits_per_byte:.4f}")

distiller.save_pretrained(args.output)  # the plain student
student_tokenizer.save_pretrained(args.output)
