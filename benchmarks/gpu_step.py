"""The whole SRA loss beside one training step of a student of 1B, on a GPU.

The student is Llama-3.2-1B in shape, with random weights, which take as long as trained ones:
bfloat16, 4 sequences of 1,024 tokens, cross-entropy over all tokens, backward and a fused AdamW.
The loss is that of 4 samples with as many spans as real ones have, the teacher's states given.
"""

from __future__ import annotations

import torch

from benchmarks.measure import Effort, interleave
from benchmarks.registry import Job, load
from benchmarks.shapes import SHAPES
from benchmarks.sra_loss import _case as loss_case

BATCH, TOKENS = 4, 1024


def share_of_a_step() -> dict[str, float]:
    """Medians in milliseconds and their ratio in percent."""
    loss = load("sra_loss")
    case = loss_case("Llama-3.2-1B", "Qwen2.5-7B", BATCH, "bfloat16")
    jobs = {"step": student_step(), "loss": loss.providers["ours"](loss.inputs(case))}
    times = interleave(jobs, Effort(most=30, least=5, seconds=5))
    medians = {f"{name} ms": float(t.median()) for name, t in times.items()}
    return medians | {"loss in % of the step": 100 * medians["loss ms"] / medians["step ms"]}


def student_step() -> Job:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES["Llama-3.2-1B"]
    config = LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=4 * shape.dim,
        num_hidden_layers=16,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(shape.vocabulary, (BATCH, TOKENS))

    def run() -> list[torch.Tensor]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach()]

    return Job(run)
