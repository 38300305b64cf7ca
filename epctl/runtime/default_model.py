"""The model and text of `epctl train` without MODEL: Moonlight's layout, small, on local text.

Everything that makes the layout is Moonlight's own: first layer dense, then MoE with 64 routed
experts, top-6, two shared, sigmoid scores with correction bias, scale 2.446, MLA attention. Only
widths and depth are small, and tokens are bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

NAME = "epctl/tiny-moonlight"

# Token ids 0 to 255 are bytes; the rest is special.
BOS, EOS, PAD, UNKNOWN = 256, 257, 258, 259
VOCAB_SIZE = 260


# The config, readable without transformers.
VALUES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 352,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "num_nextn_predict_layers": 0,
    "architectures": ["DeepseekV3ForCausalLM"],
}


def default_config() -> Any:
    """Returns the transformers config of the embedded default model."""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(**copy.deepcopy(dict(VALUES)))


def byte_tokenizer() -> Any:
    """Returns a fast tokenizer in which the id of every byte is the byte itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    special = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "<unk>": UNKNOWN}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | special, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
