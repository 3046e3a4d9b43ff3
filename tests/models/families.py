"""Model families at tiny sizes: a configuration of each that shows what is special in it.

The names that an installed transformers lacks are left out.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GLOBAL_AND_LOCAL = ["sliding_attention", "full_attention"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Name: (configuration class, what differs from SIZES).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral-window": ("MistralConfig", {"sliding_window": 6}),
    "gemma2-softcaps-windows": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3-local-global": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 6, "layer_types": GLOBAL_AND_LOCAL},
    ),
    "gemma3-multimodal": (
        "Gemma3Config",
        {
            "text_config": {
                **SIZES,
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": GLOBAL_AND_LOCAL,
            },
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **SIZES,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 16,
                "depth": 1,
                "num_heads": 2,
            },
        },
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {**SIZES, "model_type": "qwen2"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
    ),
    "gpt2": ("GPT2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "opt-post-norm": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "do_layer_norm_before": False},
    ),
    "phi-partial-rotary-bias": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {}),
    "smollm3-nope": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "cohere-logit-scale": ("CohereConfig", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.25, "sliding_window": 6}),
    "granite-logits-scaling": (
        "GraniteConfig",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 0.25}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "stablelm": ("StableLmConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, **EXPERTS}),
    "gpt-oss-sinks": (
        "GptOssConfig",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": GLOBAL_AND_LOCAL,
        },
    ),
    "deepseek3-latent": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "qwen3-next-hybrid": (
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            **EXPERTS,
        },
    ),
    "lfm2-convolution-last": ("Lfm2Config", {"layer_types": ["full_attention", "conv"]}),
}
NAMES = [name for name, (config, _) in FAMILIES.items() if hasattr(transformers, config)]


def build(name: str, rows: int, **changes: Any) -> Any:
    """A model whose attention is far from uniform and whose every part matters."""
    class_name, own = FAMILIES[name]
    sizes = {} if "text_config" in own else SIZES
    if "text_config" in own:
        own = {**own, "text_config": {**own["text_config"], "vocab_size": rows}}
    config = getattr(transformers, class_name)(**{**sizes, "vocab_size": rows, **own, **changes})
    torch.manual_seed(0)
    build_one = AutoModelForCausalLM
    if "text_config" in own:
        build_one = transformers.AutoModelForImageTextToText
    model = build_one.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            elif parameter_name.endswith(("bias", "sinks")):
                parameter.normal_()
    return model.eval()
