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
    "llama4": ("Llama4", {**EIGHT, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 40}),
    "falcon-alibi": ("Falcon", {**FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
}

MIXTURES = ["mixtral", "qwen3-moe", "qwen2-moe", "deepseek-v3", "gpt-oss", "phimoe", "hunyuan-moe", "afmoe", "llama4"]


def tiny_model(name: str, **changes: object) -> PreTrainedModel:
    """A model of `MODELS` with random weights, the same each time, in evaluation mode."""
    architecture, options = MODELS[name]
    text = "Text" if architecture in ("Gemma3", "Llama4") else ""
    configuration: Callable = getattr(transformers, f"{architecture}{text}Config")
    head = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    return randomize(getattr(transformers, f"{architecture}{head}")(configuration(**{**options, **changes})))


IMAGE, VIDEO, IMAGE_START, IMAGE_END = 90, 91, 92, 93
VISION = {"hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "num_attention_heads": 4, "patch_size": 8}
DEEP_VISION = {"depth": 2, "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "out_hidden_size": 32}
ROTATION = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}

# name -> (architecture, its options, those of its language model, those of its vision model)
IMAGE_MODELS: dict[str, tuple[str, dict, dict, dict]] = {
    # More layers of the same width look at images than there are in the language model.
    "llava": (
        "Llava",
        {"image_token_index": IMAGE, "vision_feature_layer": -1},
        {"model_type": "llama", **GROUPED},
        {"model_type": "clip_vision_model", "image_size": 16, "num_hidden_layers": 9, **VISION},
    ),
    "gemma3": (
        "Gemma3",
        {"image_token_index": IMAGE, "mm_tokens_per_image": 4},
        {**GROUPED, "query_pre_attn_scalar": 8, **SLIDING},
        {"image_size": 16, "num_hidden_layers": 2, **VISION},
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoe",
        MARKS,
        {**ROUTED, "rope_parameters": ROTATION, "decoder_sparse_step": 1},
        {**VISION, **DEEP_VISION},
    ),
    "qwen3-vl": ("Qwen3VL", MARKS, {**GROUPED, "rope_parameters": ROTATION}, {**VISION, **DEEP_VISION}),
}


def tiny_image_model(name: str, **text_changes: object) -> PreTrainedModel:
    """A model of `IMAGE_MODELS` with random weights, the same each time, in evaluation mode."""
    architecture, options, text, vision = IMAGE_MODELS[name]
    configuration: Callable = getattr(transformers, f"{architecture}Config")
    torch.manual_seed(0)
    config = configuration(text_config={**text, **text_changes}, vision_config=vision, **options)
    return randomize(getattr(transformers, f"{architecture}ForConditionalGeneration")(config))


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    """A text of nine tokens, four of which are an image's, and the random image of 16 x 16."""
    ids = torch.tensor([[3, IMAGE_START, *[IMAGE] * 4, IMAGE_END, 5, 6]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    if name == "llava":
        return {"input_ids": ids, "pixel_values": pixels}
    kinds = {
        "input_ids": ids,
        ("mm_token_type_ids" if name.startswith("qwen3-vl") else "token_type_ids"): (ids == IMAGE).int(),
    }
    if name == "gemma3":
        return {**kinds, "pixel_values": pixels}
    patches = torch.randn(16, 2 * 3 * 8 * 8, generator=torch.Generator().manual_seed(2))
    return {**kinds, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights and biases: initial ones are so small that a block is close to the identity, or are zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 3) or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def random_windows(count: int = 3, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Token windows, int64 (count, length)."""
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
