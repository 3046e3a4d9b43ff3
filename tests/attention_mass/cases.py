"""Inputs and options on which attention_mass is tested."""

import torch

from sra_kernels.attention_mass.reference import attention_mass as reference

B, HEADS, DIM = 4, 6, 8
LENGTHS = {"square": (7, 7), "cached keys": (3, 7), "one row": (1, 5), "one key": (1, 1)}
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "both": {"softcap": 0.7, "window": 2},
}


def case(queries, keys, dtype=torch.float64, kv_heads=2, rows=False, mask="none"):
    query = (2 * torch.randn(B, HEADS, queries, DIM)).to(dtype)
    key = torch.randn(B, kv_heads, keys, DIM).to(dtype)
    options = {"scale": 0.5}
    if rows:
        options["query_index"] = torch.randint(queries, (B,))
    if mask == "padding":  # right, left, none, and a sample without any real key
        real = torch.ones(B, keys, dtype=torch.bool)
        real[0, keys // 2 + 1 :] = False
        real[1, : keys // 2] = False
        real[3] = False
        options["key_mask"] = real
    elif mask == "random":
        options["key_mask"] = torch.rand(B, keys) < 0.7
    return query, key, options


def eager(query, key, scale, query_index=None, key_mask=None, softcap=None, window=None):
    return reference(query, key, query_index, scale, key_mask, softcap, window)
