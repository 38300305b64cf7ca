"""What to build for each fixture: a transformers model_type and the config keys that differ.

The defaults of the class are kept wherever they build; the number of layers is cut so that a
fixture stays small, never the shape of a layer.
"""

SMALL = {"num_hidden_layers": 4}


def small(model_type, **config):
    return {"model_type": model_type, "config": {**SMALL, **config}}


def two(model_type, text=None, vision=None, **config):
    """Returns a spec of a model with a text and a vision section."""
    return {
        "model_type": model_type,
        "config": {
            "text_config": {"num_hidden_layers": 4, **(text or {})},
            "vision_config": vision or {"num_hidden_layers": 4},
            **config,
        },
    }


DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]

SPECS = {
    # every config type with an expert-parallel plan
    "afmoe": small("afmoe"),
    "aria_text": small("aria_text"),
    "axk1": small("axk1"),
    "axk2": small("axk2"),
    "bailing_hybrid": small("bailing_hybrid"),
    "beam": small("beam"),
    "cohere2_moe": small("cohere2_moe", num_shared_experts=2),
    "deepseek_ocr2_text": small(
        "deepseek_ocr2_text", num_experts_per_tok=6, mlp_layer_types=DENSE_FIRST
    ),
    "deepseek_v2": small("deepseek_v2", num_experts_per_tok=6, first_k_dense_replace=1),
    "deepseek_v3": small("deepseek_v3"),
    "deepseek_v32": small("deepseek_v32"),
    "deepseek_v4": small("deepseek_v4"),
    "diffusion_gemma_text": small(
        "diffusion_gemma_text", num_experts=16, top_k_experts=4, moe_intermediate_size=704
    ),
    "dots1": small(
        "dots1",
        n_routed_experts=128,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
    ),
    "dots3_note_vision_encoder": {"model_type": "dots3_note_vision_encoder"},
    "dots3_note_text": small("dots3_note_text"),
    "ernie4_5_moe": small("ernie4_5_moe", moe_layer_end_index=3),
    "ernie4_5_vl_moe_text": small("ernie4_5_vl_moe_text"),
    "exaone_moe": small("exaone_moe"),
    "flex_olmo": small("flex_olmo"),
    "flint": small("flint"),
    "gemma4_text": small(
        "gemma4_text",
        enable_moe_block=True,
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=704,
    ),
    "glm4_moe": small("glm4_moe"),
    "glm4_moe_lite": small("glm4_moe_lite"),
    "glm4v_moe_text": small("glm4v_moe_text"),
    "glm5_next_text": small("glm5_next_text"),
    "glm_moe_dsa": small("glm_moe_dsa"),
    "gpt_oss": small("gpt_oss"),
    "granitemoe": small("granitemoe"),
    "granitemoe_swa": small("granitemoe_swa"),
    "granitemoehybrid": small("granitemoehybrid"),
    "granitemoeshared": small("granitemoeshared", shared_intermediate_size=1024),
    "hunyuan_v1_moe": small("hunyuan_v1_moe", num_experts=8, moe_topk=2, head_dim=128),
    "hy_v3": small("hy_v3"),
    "hy_v4": small("hy_v4"),
    "inkling_text": small("inkling_text"),
    "inkling2_text": small("inkling2_text"),
    "jamba": small("jamba"),
    "kimi_linear": small("kimi_linear"),
    "kolibri1": small("kolibri1"),
    "laguna": small("laguna"),
    "lfm2_moe": small("lfm2_moe", layer_types=["conv", "conv", "full_attention", "conv"]),
    "mellum": small("mellum"),
    "mimo_v2_flash": small("mimo_v2_flash"),
    "minimax": small("minimax"),
    "minimax_m2": small("minimax_m2"),
    "minimax_m3_vl_text": small("minimax_m3_vl_text"),
    "mistral4": small("mistral4"),
    "mistral_large4_text": small("mistral_large4_text"),
    "mixtral": small("mixtral"),
    "muse_spark_text": small("muse_spark_text"),
    "nemotron_h": {
        "model_type": "nemotron_h",
        "config": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    },
    "olmoe": small("olmoe"),
    "openai_privacy_filter": small("openai_privacy_filter"),
    "phimoe": small("phimoe"),
    "qwen2_moe": small("qwen2_moe"),
    "qwen3_5_moe_text": small("qwen3_5_moe_text"),
    "qwen3_moe": small("qwen3_moe"),
    "qwen3_next": small("qwen3_next"),
    "qwen3_omni_moe_text": small("qwen3_omni_moe_text"),
    "qwen3_omni_moe_talker_text": {
        "model_type": "qwen3_omni_moe_talker_text",
        "config": {**SMALL, "shared_expert_intermediate_size": 768},
    },
    "qwen3_vl_moe_text": small("qwen3_vl_moe_text"),
    "qwen4_exp_text": small(
        "qwen4_exp_text",
        indexer_budget=2048,
        indexer_compress_ratio=4,
        indexer_head_dim=256,
        indexer_n_heads=16,
        indexer_kv_heads=1,
    ),
    "solar_open": small("solar_open"),
    "step3p5": small("step3p5"),
    "unlimited_ocr_text": small("unlimited_ocr_text"),
    "zaya": small("zaya"),
    # other mixtures of experts
    "llama4_text": small("llama4_text"),
    "longcat_flash": {
        "model_type": "longcat_flash",
        "config": {"num_layers": 2},
        # The module pads gate and up for the 256 identity experts, which no checkpoint stores.
        "no_hub": r"experts\.(51[2-9]|5[2-9][0-9]|[67][0-9][0-9])\.",
    },
    "jetmoe": small("jetmoe"),
    "dbrx": {
        "model_type": "dbrx",
        "config": {"n_layers": 2, "attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0}},
    },
    "doge": small("doge", is_moe=True),
    "switch_transformers": {
        "model_type": "switch_transformers",
        "config": {
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
        },
    },
    "nllb_moe": {
        "model_type": "nllb-moe",
        "config": {
            "encoder_layers": 4,
            "decoder_layers": 4,
            "num_experts": 8,
            "encoder_sparse_step": 4,
            "decoder_sparse_step": 4,
        },
    },
    # vision-language
    "llava": two("llava"),
    "llava_next": two("llava_next"),
    "llava_onevision": two("llava_onevision"),
    "internvl": two("internvl"),
    "qwen2_vl": two("qwen2_vl", vision={"depth": 4}),
    "qwen2_5_vl": two("qwen2_5_vl", vision={"depth": 8}),
    "qwen3_vl": two("qwen3_vl", vision={"depth": 4, "deepstack_visual_indexes": [1]}),
    "qwen3_vl_moe": two("qwen3_vl_moe", vision={"depth": 4, "deepstack_visual_indexes": [1]}),
    "qwen3_5_moe": two("qwen3_5_moe", vision={"depth": 4}),
    "qwen3_omni_moe": {"model_type": "qwen3_omni_moe_thinker"},
    "glm4v": two("glm4v", vision={"depth": 4}),
    "glm4v_moe": two("glm4v_moe", vision={"depth": 4}),
    "llama4": two("llama4"),
    "aria": two("aria"),
    "gemma3": two("gemma3"),
    "gemma4": two(
        "gemma4",
        text={
            "enable_moe_block": True,
            "num_experts": 16,
            "top_k_experts": 4,
            "moe_intermediate_size": 704,
        },
    ),
    "paligemma": two("paligemma"),
    "idefics3": two("idefics3"),
    "smolvlm": two("smolvlm"),
    "mistral3": two("mistral3"),
    "minimax_m3_vl": two("minimax_m3_vl"),
    "mistral_large4": two("mistral_large4"),
    "step3p7": two("step3p7"),
    "kimi_k25": two("kimi_k25"),
    "ernie4_5_vl_moe": two("ernie4_5_vl_moe", vision={"depth": 4}),
    "deepseek_ocr2": two(
        "deepseek_ocr2", text={"num_experts_per_tok": 6, "mlp_layer_types": DENSE_FIRST}
    ),
    # plain towers
    "vit": small("vit"),
    "siglip_vision_model": small("siglip_vision_model"),
    "dinov2": small("dinov2"),
    "clip_vision_model": small("clip_vision_model"),
}

# transformers' config types with an expert-parallel plan; test_regenerate.py asks transformers.
EP_PLAN_TYPES = tuple(SPECS)[: tuple(SPECS).index("llama4_text")]
