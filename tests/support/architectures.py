"""Tiny configurations of many decoder architectures of transformers: name (its model_type) -> kind, config, input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCAB, IMAGE, VIDEO = 61, 60, 59  # vocabulary size; placeholder tokens of an image and a video

DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # far from zero, so that every layer matters
}
EXPERTS = {
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"num_key_value_heads": 4, "head_dim": None}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 4, "head_dim": None}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention"]}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}
GPT |= dict.fromkeys(("head_dim", "num_key_value_heads", "intermediate_size"))


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VIDEO, (2, 6), generator=torch.Generator().manual_seed(0))}


class Architecture(NamedTuple):
    kind: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = text
    remark: str = ""
    path: str | None = None  # for `attach`, where it does not find the layers itself
    is_vision: bool = False
    idle: tuple[int, ...] = ()  # layers that these inputs do not reach
    has_linear_head: bool = True
    since: str = "4.57"
    """The first tested version of transformers in which the model trains or accepts this configuration."""

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


ARCHITECTURES: dict[str, Architecture] = {}


def _config(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": name} | {k: v for k, v in (DENSE | changes).items() if v is not None}


def _add(
    kind: str,
    names: str,
    *,
    remark: str = "",
    path: str | None = None,
    linear_head: bool = True,
    since: str = "4.57",
    **changes: Any,
) -> None:
    for name in names.split():
        ARCHITECTURES[name] = Architecture(
            kind, _config(name, changes), remark=remark, path=path, has_linear_head=linear_head, since=since
        )


# ------------------------------------------------------------------ dense

_add(
    "dense",
    "apertus arcee bitnet bloom cohere cohere2 cwm diffllama doge ernie4_5 exaone4 gemma gemma2 glm glm4 gpt2 "
    "gpt_neox gpt_neox_japanese helium hunyuan_v1_dense jais2 llama ministral ministral3 mistral "
    "nanochat nemotron olmo olmo2 olmo3 openai-gpt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 "
    "stablelm starcoder2 vaultgemma",
)
_add("dense", "gpt_bigcode", since="5.0")  # earlier versions do not recompute under checkpointing
_add("dense", "granite hyperclovax", logits_scaling=4.0)
_add("dense", "gemma3_text", final_logit_softcapping=2.0)
_add("dense", "mpt", logit_scale=0.25)  # its forward ignores it
_add(
    "dense",
    "modernbert-decoder",
    linear_head=False,
    remark="a dense layer and a norm lie before its head: take `policy_loss` of its logits",
)
_add("dense", "falcon", head_dim=None, num_key_value_heads=None)
_add("dense", "gpt_neo", num_layers=2, **{**GPT, "attention_types": [[["global", "local"], 1]], "window_size": 4})
_add("dense", "gptj codegen", **GPT)
_add("dense", "opt", ffn_dim=24, word_embed_proj_dim=16)
_add("dense", "xglm", d_model=16, ffn_dim=24, num_layers=2, attention_heads=4)
_add("dense, latent attention", "minicpm3 youtu", **LATENT)
_add(
    "dense, inputs by layer",
    "gemma3n_text",
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=VOCAB,
    laurel_rank=4,
    layer_types=["sliding_attention", "full_attention"],
    activation_sparsity_pattern=[0.0, 0.0],
    altup_num_inputs=2,
    remark="the layers' input is a stack (streams, B, T, D): with `row_ids` (B, T) a position's streams are one row",
)
_add(
    "dense, inputs by layer",
    "gemma4_text",
    hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=VOCAB,
    global_head_dim=4,
    layer_types=["sliding_attention", "full_attention"],
)
_add(
    "recurrent depth",
    "hrm_text",
    num_layers_per_stack=2,
    H_cycles=2,
    L_cycles=1,
    path="model.H_module.layers",
    remark="two stacks, each run several times a forward: name one with `path`; each run has noise of its own",
)

# ------------------------------------------------------------------ mixtures of experts

_add(
    "MoE",
    "afmoe aria_text cohere2_moe dots1 exaone_moe ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe granitemoeshared "
    "hunyuan_v1_moe jetmoe llama4_text mimo_v2_flash minimax_m2 mixtral olmoe qwen2_moe qwen3_moe solar_open",
    **EXPERTS,
    moe_num_experts=4,
    moe_k=2,
    moe_num_shared_experts=1,
    sliding_window=8,
)
_add("MoE", "phimoe", since="5.0", **EXPERTS)  # earlier versions route at random in training
_add("MoE, latent attention", "deepseek_v2 deepseek_v3 glm4_moe_lite", **EXPERTS | LATENT)
_add(
    "MoE, latent attention",
    "deepseek_v4",
    **EXPERTS | {"num_key_value_heads": 1, "intermediate_size": None, "first_k_dense_replace": None},
    since="5.24",
    q_lora_rank=8,
    partial_rotary_factor=0.5,
    layer_types=["sliding_attention", "compressed_sparse_attention"],
    mlp_layer_types=["moe", "moe"],
    compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 2},
    hc_mult=2,
    sliding_window=8,
    o_groups=2,
    o_lora_rank=8,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=2,
    remark="the layers read streams, (B, T, streams, D): with `row_ids` a position's streams are one row",
)
_add(
    "MoE, latent attention",
    "longcat_flash",
    **EXPERTS | LATENT | {"head_dim": 4},
    num_layers=2,
    ffn_hidden_size=24,
    expert_ffn_hidden_size=8,
    moe_topk=2,
    zero_expert_num=1,
)
_add(
    "MoE",
    "dbrx",
    d_model=16,
    n_heads=4,
    n_layers=2,
    max_seq_len=64,
    attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim")),
)

# ------------------------------------------------------------------ hybrids, linear attention, state spaces

_add("hybrid, state space and attention", "bamba", **MAMBA, attn_layer_indices=[1])
_add("hybrid, state space and attention", "falcon_h1", **MAMBA, mamba_d_ssm=32, lm_head_multiplier=0.5)
_add(
    "hybrid, state space and attention, MoE",
    "granitemoehybrid",
    **EXPERTS | MAMBA,
    shared_intermediate_size=8,
    layer_types=["mamba", "attention"],
)
_add(
    "hybrid, state space and attention, MoE",
    "jamba",
    **EXPERTS,
    attn_layer_period=2,
    attn_layer_offset=1,
    mamba_d_state=4,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
)
_add(
    "hybrid, state space and attention, MoE",
    "nemotron_h",
    **EXPERTS,
    num_hidden_layers=None,
    layers_block_type=["mamba", "attention", "moe"],
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=4,
    n_groups=1,
    chunk_size=4,
    moe_shared_expert_intermediate_size=8,
)
_add(
    "hybrid, state space and shared attention",
    "zamba",
    since="5.23",  # before, reentrant checkpointing passes its shared inputs twice
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    num_hidden_layers=4,
    n_mamba_heads=2,
    mamba_d_state=4,
    mamba_dt_rank=4,
    use_mamba_kernels=False,
    num_key_value_heads=4,
    head_dim=None,
    remark="attention weights shared between hybrid layers; each layer has noise of its own",
)
_add(
    "hybrid, state space and shared attention",
    "zamba2",
    since="5.23",  # before, reentrant checkpointing passes its shared inputs twice
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    num_hidden_layers=4,
    n_mamba_heads=4,
    mamba_d_state=4,
    chunk_size=4,
    adapter_rank=4,
    num_key_value_heads=4,
    head_dim=None,
    remark="attention weights shared between hybrid layers; each layer has noise of its own",
)
_add("hybrid, linear attention", "qwen3_5_text olmo_hybrid", **DELTA | LINEAR_FULL)
_add("hybrid, linear attention, MoE", "qwen3_next qwen3_5_moe_text", **EXPERTS | DELTA | LINEAR_FULL)
_add(
    "hybrid, linear attention, MoE",
    "kimi_linear",
    **EXPERTS | LATENT | {"q_lora_rank": None},
    linear_head_dim=4,
    linear_num_heads=2,
    layer_types=["linear_attention", "full_attention"],
    mlp_layer_types=["dense", "sparse"],
)
_add("hybrid, linear attention, MoE", "minimax", **EXPERTS | LINEAR_FULL, block_size=4)
_add("hybrid, convolution and attention", "lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8)
_add(
    "hybrid, convolution and attention, MoE",
    "lfm2_moe",
    **EXPERTS,
    layer_types=["conv", "full_attention"],
    num_dense_layers=1,
)
_add(
    "hybrid, recurrence and attention",
    "recurrent_gemma",
    since="5.0",  # earlier versions keep a state between forwards
    num_hidden_layers=3,
    block_types=["recurrent", "recurrent", "attention"],
    attention_window_size=8,
    head_dim=None,
    lru_width=16,
)
_add("state space", "mamba falcon_mamba", state_size=4, time_step_rank=4)
_add("state space", "mamba2", state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
_add("recurrent", "rwkv", attention_hidden_size=16, context_length=64)
_add("recurrent", "xlstm", since="5.5", num_heads=2, num_blocks=2, head_dim=None, chunk_size=4)

# ------------------------------------------------------------------ vision and language

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
SPECIAL = {"image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "type": "default", "mrope_section": [1, 1, 0]}
PATCHES = VISION | {"depth": 2, "embed_dim": 16, "out_hidden_size": 16, "spatial_merge_size": 2, "in_channels": 3}
PATCHES |= {"temporal_patch_size": 2, "fullatt_block_indexes": [1], "window_size": 16, "num_position_embeddings": 16}


def pixels(tokens: int, *shape: int, **others: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Two rows of text, each with an image of `tokens` tokens; the images' pixels are (2, *shape)."""

    def inputs() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.full((2, tokens), IMAGE)
        words = text()["input_ids"]
        values = torch.randn(2, *shape, generator=generator)
        return {"input_ids": torch.cat([words[:, :2], ids, words[:, 2:]], 1), "pixel_values": values, **others}

    return inputs


def patches(tokens: int, width: int) -> Callable[[], dict[str, Tensor]]:
    """Like `pixels`, with the images' patches in one matrix, as the Qwen-VL family expects."""

    def inputs() -> dict[str, Tensor]:
        side = int((4 * tokens) ** 0.5)
        found = pixels(tokens, 4 * tokens, width)()
        found["pixel_values"] = found["pixel_values"].flatten(0, 1)
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).int()
        return found | {"image_grid_thw": torch.tensor([[1, side, side]] * 2)}

    return inputs


def _add_vision(
    name: str,
    image: Callable[[], dict[str, Tensor]] | None,
    text_config: dict[str, Any],
    vision_config: dict[str, Any],
    *,
    idle: tuple[int, ...] = (),
    remark: str = "",
    since: str = "4.57",
    is_typed: bool = False,
    **others: Any,
) -> None:
    """Add a model with a vision tower, once with text only and once with an image.

    idle: layers that text alone does not run; is_typed: the model takes token_type_ids that mark image tokens.
    """

    def typed(inputs: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        return lambda: (found := inputs()) | {"token_type_ids": (found["input_ids"] == IMAGE).long()}

    words = {k: v for k, v in (DENSE | text_config).items() if v is not None}
    config = {"model_type": name, "text_config": words, "vision_config": vision_config, "tie_word_embeddings": False}
    config |= SPECIAL | others
    for key, inputs in ((name, text), (f"{name} + image", image)):
        if inputs is not None:
            ARCHITECTURES[key] = Architecture(
                "vision and language",
                config,
                typed(inputs) if is_typed else inputs,
                since=since,
                is_vision=True,
                idle=idle if inputs is text else (),
                remark=remark if inputs is text else "",
            )


_siglip = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 16}
_clip = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
_add_vision("llava", pixels(16, 3, 16, 16), {"model_type": "llama"}, _clip, vision_feature_layer=-1)
_add_vision(
    "gemma3",
    pixels(4, 3, 16, 16),
    {"model_type": "gemma3_text", "sliding_window": 8, "final_logit_softcapping": 2.0},
    _siglip,
    mm_tokens_per_image=4,
    is_typed=True,
)
_add_vision(
    "paligemma",
    pixels(16, 3, 16, 16),
    {"model_type": "gemma"},
    _siglip,
    is_typed=True,
    projection_dim=16,
    hidden_size=16,
    vocab_size=VOCAB,
)
_add_vision(
    "aya_vision",
    pixels(4, 3, 16, 16),
    {"model_type": "cohere2"},
    _siglip,
    downsample_factor=2,
    adapter_layer_norm_eps=1e-6,
)
_add_vision("idefics3", pixels(4, 1, 3, 16, 16), {"model_type": "llama"}, VISION, scale_factor=2)
_add_vision("smolvlm", pixels(4, 1, 3, 16, 16), {"model_type": "llama"}, VISION, scale_factor=2)
_add_vision(
    "internvl",
    pixels(4, 3, 16, 16),
    {"model_type": "qwen2"},
    VISION | {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
)
_add_vision(
    "mistral3",
    pixels(4, 3, 16, 16, image_sizes=torch.tensor([[16, 16]] * 2)),
    {"model_type": "mistral"},
    VISION | {"model_type": "pixtral", "head_dim": 8},
)
_add_vision("lfm2_vl", None, {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
            VISION | {"model_type": "siglip2_vision_model", "num_patches": 16}, projector_hidden_size=16)  # fmt: skip
_add_vision(
    "mllama",
    pixels(
        1, 1, 1, 3, 16, 16,
        aspect_ratio_ids=torch.ones(2, 1, dtype=torch.int64),
        aspect_ratio_mask=torch.ones(2, 1, 1, dtype=torch.int64),
    ),
    {"model_type": "mllama_text_model", "num_hidden_layers": 3, "cross_attention_layers": [1], "head_dim": None},
    VISION
    | {"attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 1, "intermediate_layers_indices": [0],
       "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]]},
    since="5.0",
    idle=(1,),
    remark="text alone skips the cross-attention layers: they get no noise, and their sigma no gradient",
)  # fmt: skip
_rope = {"rope_parameters": MROPE, "rope_scaling": MROPE}
_add_vision("qwen2_vl", patches(4, 96), {"model_type": "qwen2_vl_text", **_rope, "head_dim": None}, PATCHES)
_add_vision("qwen2_5_vl", patches(4, 96), {"model_type": "qwen2_5_vl_text", **_rope, "head_dim": None}, PATCHES)
_deep = PATCHES | {"deepstack_visual_indexes": [0, 1]}
_add_vision("qwen3_vl", patches(4, 96), {"model_type": "qwen3_vl_text", **_rope}, _deep)
_add_vision("qwen3_vl_moe", patches(4, 96), {"model_type": "qwen3_vl_moe_text", **_rope} | EXPERTS, _deep)
_add_vision("qwen3_5", patches(4, 96), {"model_type": "qwen3_5_text", **_rope, **DELTA, **LINEAR_FULL}, PATCHES)
_add_vision("glm4v", patches(4, 96), {"model_type": "glm4v_text", **_rope}, PATCHES, since="5.0")
