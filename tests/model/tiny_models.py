"""Random models of every supported architecture, a few thousand weights each."""

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Names that most configurations share.
COMMON = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
OPT = {**COMMON, "ffn_dim": 56, "word_embed_proj_dim": 32, "dropout": 0.0}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_ln_in_parallel_attn": None,
}

ROUTED = {
    **GROUPED,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
EIGHT = {**ROUTED, "num_experts": 8, "num_local_experts": 8}  # routers that are wide enough to be packed
DEEPSEEK = {
    **ROUTED,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}

# name -> (architecture, what differs)
MODELS: dict[str, tuple[str, dict]] = {
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("Llama", {**GROUPED, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", {**GROUPED, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2", {**COMMON, "num_key_value_heads": 2, "use_sliding_window": True, **SLIDING}),
    "qwen3": ("Qwen3", GROUPED),
    "phi3": ("Phi3", {**COMMON, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2", {**GROUPED, "query_pre_attn_scalar": 8, **SLIDING}),
    "gemma3": ("Gemma3", {**GROUPED, "query_pre_attn_scalar": 8, **SLIDING}),
    "gpt-neox": ("GPTNeoX", COMMON),
    "gpt-neox-serial": ("GPTNeoX", {**COMMON, "use_parallel_residual": False}),
    "gpt2": ("GPT2", GPT2),
    "falcon": ("Falcon", {**FALCON, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon-new": ("Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "mixtral": ("Mixtral", ROUTED),
    "qwen3-moe": ("Qwen3Moe", ROUTED),
    "qwen2-moe": ("Qwen2Moe", {**ROUTED, "shared_expert_intermediate_size": 24}),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    "gpt-oss": ("GptOss", ROUTED),
    "phimoe": ("Phimoe", EIGHT),
    "hunyuan-moe": ("HunYuanMoEV1", {**EIGHT, "moe_topk": [2] * 3}),
    "afmoe": ("Afmoe", EIGHT),
    "falcon-alibi": ("Falcon", {**FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
}

MIXTURES = ["mixtral", "qwen3-moe", "qwen2-moe", "deepseek-v3", "gpt-oss", "phimoe", "hunyuan-moe", "afmoe"]


def tiny_model(name: str, **changes: object) -> PreTrainedModel:
    """A model of `MODELS` with random weights, the same each time, in evaluation mode."""
    architecture, options = MODELS[name]
    text = "Text" if architecture == "Gemma3" else ""
    configuration: Callable = getattr(transformers, f"{architecture}{text}Config")
    head = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{architecture}{head}")(configuration(**{**options, **changes}))
    # Initial weights are so small that every block is close to the identity, and biases are zero; not so here.
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim in (2, 3) or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def random_windows(count: int = 3, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Token windows, int64 (count, length)."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
