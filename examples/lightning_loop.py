"""PyTorch Lightning: python examples/lightning_loop.py --data rows.jsonl (pip install lightning)"""

import argparse
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from sra import SharedVocabulary, SpanAligner, SpanCollator, SpanDistiller, load_rows, recipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--data", default=str(Path(__file__).with_name("rows.jsonl")))
parser.add_argument("--output", default="runs/lightning_loop")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--learning-rate", type=float, default=3e-4)
args = parser.parse_args()


class Distil(lightning.LightningModule):
    def __init__(self, distiller):
        super().__init__()
        self.distiller = distiller

    def on_fit_start(self):
        for teacher in self.distiller.teachers:  # no part of the module, so not moved with it
            teacher.to(self.device)

    def training_step(self, batch):
        out = self.distiller(**batch)
        self.log_dict({k: v for k, v in out.items() if v is not None}, batch_size=1)
        self.print(f"step {self.global_step} loss {out.loss:.4f}")
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=args.learning_rate)


lightning.seed_everything(0)
student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16)
student_tokenizer = AutoTokenizer.from_pretrained(args.student)
teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher)
vocabulary = SharedVocabulary(student_tokenizer, teacher_tokenizer, match="normalised")
distiller = SpanDistiller(student, teacher, recipe("respell"), vocabulary=vocabulary)
collator = SpanCollator(SpanAligner(student_tokenizer, teacher_tokenizer), max_length=512)
loader = DataLoader(load_rows(args.data), args.batch_size, shuffle=True, collate_fn=collator)

trainer = lightning.Trainer(
    max_epochs=args.epochs, gradient_clip_val=1.0, default_root_dir=args.output,
    logger=False, enable_checkpointing=False, enable_progress_bar=False,
)  # fmt: skip
trainer.fit(Distil(distiller), loader)
if trainer.is_global_zero:
    distiller.save_pretrained(args.output)  # the plain student
    student_tokenizer.save_pretrained(args.output)
