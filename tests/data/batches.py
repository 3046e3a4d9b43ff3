"""Batches read back into what they were made of, and rows to make them of."""

from __future__ import annotations

import torch

ROW = {"prompt": "p", "completion": "c"}
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "Name a river of Egypt."},
        {"role": "assistant", "content": "The Nile flows through Egypt."},
        {"role": "user", "content": "Guten Tag"},
        {"role": "assistant", "content": " schöne Grüße! 🐸\nThe Nile flows."},
    ]
}
SAID = [m["content"] for m in CONVERSATION["messages"] if m["role"] == "assistant"]
PADDINGS = ("right", "left", "free")


def spelt(tokenizer, ids, spans):
    """Each span's text, in the vocabulary's own letters: pieces of characters have some, too."""
    backend = tokenizer.backend_tokenizer
    return [
        "".join(backend.id_to_token(i) for i in ids.flatten()[a:b].tolist())
        for a, b in spans.tolist()
    ]


def both_sides(student, teacher, batch, k=0):
    """The spans' texts on the student's side and on teacher `k`'s."""
    side = batch["teachers"][k]
    return (
        spelt(student, batch["input_ids"], side["student_spans"]),
        spelt(teacher, side["input_ids"], side["teacher_spans"]),
    )


def sequences(batch, name="input_ids"):
    """A batch's rows without padding, however it is laid out."""
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten()[1:].tolist()
        return [part.tolist() for part in torch.tensor_split(batch[name][0], starts)]
    return [
        row[mask.bool()].tolist()
        for row, mask in zip(batch[name], batch["attention_mask"], strict=True)
    ]
