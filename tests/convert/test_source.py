"""Who reads a shard folder by slices sees the source's tensors, and opens its own files only."""

import pytest
from convert_runs import shard
from stored_models import read_tensors, write_model

from epctl.convert.execute import Reader, block_chunks
from epctl.convert.jobs import ShardOptions, plan_shard_folder
from epctl.convert.open import open_checkpoint
from epctl.convert.source import shard_source
from epctl.errors import InputError
from epctl.layout.detect import detect
from epctl.layout.source import read_folder
from epctl.output import set_mode


@pytest.fixture(autouse=True)
def quiet():
    set_mode(quiet=True)
    yield
    set_mode()


def test_a_shard_folder_has_the_sources_layout_and_bytes(tmp_path):
    model = write_model(tmp_path / "m", "per_expert", num_experts=8)
    shard(model, tmp_path / "s", 4)
    source = shard_source(tmp_path / "s")
    assert detect(source).moe == detect(read_folder(model)).moe
    wanted = read_tensors(model)
    for name, entry in source.tensors.items():
        data = source.shard_path(entry.file).read_bytes()[entry.start : entry.end]
        assert (entry.dtype, entry.shape, data) == wanted[name]
    files = {entry.file for name, entry in source.tensors.items() if ".experts.3." in name}
    assert files == {"rank-00001/model-00001-of-00001.safetensors"}


def test_experts_in_several_files_under_one_name_are_refused(tmp_path):
    model = write_model(tmp_path / "m", "fused", num_experts=8)
    shard(model, tmp_path / "s", 2)
    with pytest.raises(InputError, match="lies in 2 ranks' files"):
        shard_source(tmp_path / "s")
    shard(model, tmp_path / "one", 1)
    assert detect(shard_source(tmp_path / "one")).moe.num_experts == 8


def test_other_folders_are_no_shard_folders(tmp_path):
    assert shard_source(write_model(tmp_path / "m", "per_expert")) is None


@pytest.mark.parametrize("storage", ["per_expert", "fused_transposed", "flat_rows", "w13"])
def test_one_rank_reads_no_byte_of_another_ranks_experts(storage, tmp_path):
    model = write_model(tmp_path / "m", storage, num_experts=8, hidden=32, width=16)
    view = open_checkpoint(str(model))
    wanted = read_tensors(model)
    all_experts = sum(len(body) for name, (_, _, body) in wanted.items() if "experts" in name)
    for choice in ("checkpoint", "fused"):
        plan = plan_shard_folder(view, ShardOptions(4, storage=choice, rank=2))
        num_bytes_read = 0
        for file in plan.files:
            with Reader(view) as reader:
                for tensor in file.tensors:
                    for block in tensor.blocks:
                        for _ in block_chunks(reader, block):
                            pass
                if file.path.startswith("rank"):
                    num_bytes_read += reader.num_bytes_read
        assert num_bytes_read == all_experts // 4
