"""What epctl writes is a Hugging Face model to others: transformers and plain safetensors."""

import json

import pytest
from convert_runs import export, merge, shard

from epctl.output import set_mode

torch = pytest.importorskip("torch", reason="transformers loads into torch")
transformers = pytest.importorskip("transformers", reason="the reader under test")
safetensors = pytest.importorskip("safetensors", reason="the reader under test")


@pytest.fixture(autouse=True)
def quiet():
    set_mode(quiet=True)
    yield
    set_mode()


SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SIZES, moe_intermediate_size=8, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=8, num_experts=8, num_experts_per_tok=2, head_dim=8,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, num_local_experts=8, num_experts_per_tok=2,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, num_local_experts=8, num_experts_per_tok=2, head_dim=8,
    ),
}  # fmt: skip


def save(name, folder):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


def logits(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_folder_gives_the_same_logits(name, tmp_path):
    source = save(name, tmp_path / "model")
    before = logits(source)
    assert before.isfinite().all()
    assert before.std() > 0.01
    for storage in ("checkpoint", "fused"):
        shard(source, tmp_path / storage, 4, storage=storage)
        merge(tmp_path / storage, tmp_path / f"{storage}-merged")
        assert torch.equal(logits(tmp_path / f"{storage}-merged"), before)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_a_shard_folder_is_a_model_to_transformers(name, tmp_path):
    source = save(name, tmp_path / "model")
    shard(source, tmp_path / "s", 4)
    assert torch.equal(logits(tmp_path / "s"), logits(source))


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_storage_is_what_transformers_modules_hold(name, tmp_path):
    source = save(name, tmp_path / "model")
    export(source, tmp_path / "fused", storage="fused")
    weights = json.loads((tmp_path / "fused/manifest.json").read_text())["tensors"]
    live = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).state_dict()
    experts = {name: entry for name, entry in weights.items() if ".experts." in name and (
        "shared" not in name)}  # fmt: skip
    assert experts
    for tensor, entry in experts.items():
        assert tuple(entry["shape"]) == tuple(live[tensor].shape)
    assert torch.equal(logits(tmp_path / "fused"), logits(source))


def test_plain_safetensors_reads_every_file(tmp_path):
    from safetensors import safe_open

    source = save("qwen3_moe", tmp_path / "model")
    shard(source, tmp_path / "s", 2)
    index = json.loads((tmp_path / "s/model.safetensors.index.json").read_text())
    wanted = {}
    for path in source.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            wanted |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(index["weight_map"]) == set(wanted)
    for name, place in index["weight_map"].items():
        with safe_open(tmp_path / "s" / place, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_tensor(name), wanted[name])
            assert torch.equal(file.get_slice(name)[:], wanted[name])
    rank = tmp_path / "s/rank-00001"
    own = json.loads((rank / "model.safetensors.index.json").read_text())["weight_map"]
    assert {(rank / place).is_file() for place in own.values()} == {True}
