"""One test a seam: what epctl leans on inside DeepSpeed, asked of the installed version."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from launch import run_ranks
from seams_ranks import AHEAD, ANOTHER_CLASS, PARTS, WAYS

pytestmark = pytest.mark.distributed

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seams")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return run_ranks("seams_ranks", 4, folder)


def test_distributed_start_builds_no_shared_memory_op(ranks: Ranks) -> None:
    assert all(rank["no_build"] for rank in ranks)


def test_ep_groups_are_consecutive_and_edp_groups_strided(ranks: Ranks) -> None:
    assert ranks[3]["groups"]["2"] == {"ep": [2, 3], "edp": [1, 3], "ep_rank": 1, "edp_rank": 1}
    assert ranks[3]["groups"]["4"] == {
        "ep": [0, 1, 2, 3],
        "edp": [3],
        "ep_rank": 3,
        "edp_rank": 0,
    }
    assert ranks[3]["groups"]["1"]["edp"] == [0, 1, 2, 3]


def test_ep_size_that_does_not_divide_the_ranks_is_refused(ranks: Ranks) -> None:
    message = "expert parallel size 3 does not divide the 4 ranks"
    assert ranks[0]["groups"]["illegal"] == message


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_engine_finds_the_layer_and_binds_a_real_process_group(ranks: Ranks, zero: int) -> None:
    assert ranks[0][f"layer{zero}"] == {
        "has_moe_layers": True,
        "num_experts": [8, 8],
        "group_is_group": True,
        "group_size": 2,
        "same_group": True,
    }


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_flat_partitions_cover_each_element_once(ranks: Ranks, zero: int) -> None:
    for rank in ranks:
        assert rank[f"partitions{zero}"] == {"complete": True, "mismatches": 0}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_fault_expert_parameters_not_following_the_schedule(ranks: Ranks, zero: int) -> None:
    """AutoEP's experts once kept their first learning rate for ever."""
    for rank in ranks:
        rates = rank[f"rates{zero}"]
        assert rates["kinds"] == [False, True]
        assert rates["still"] == {"experts": 0, "dense": 0}
        # w1, w3 and w2 of two layers with four local experts, except any that saw no token
        assert rates["moved"]["experts"] >= 20
        assert rates["moved"]["dense"] > 20
        # Past warm-up and into the linear decay: not 1.0, which a group left behind would have.
        assert rates["rates"] == pytest.approx([0.7] * len(rates["rates"]))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_optimizer_state_exists_on_every_rank_before_the_first_step(
    ranks: Ranks, zero: int
) -> None:
    assert all(rank[f"state{zero}"] for rank in ranks)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeeds_own_checkpoint_keeps_the_next_loss(ranks: Ranks, zero: int) -> None:
    for rank in ranks:
        assert rank[f"save{zero}"]["resumed"] == rank[f"save{zero}"]["unbroken"]


def test_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["failed_save"]["message"].startswith("checkpoint not written: cannot write")
        assert rank["failed_save"]["left"] == []


@pytest.mark.parametrize("zero", [2, 3])
def test_an_engine_let_go_gives_its_memory_back(ranks: Ranks, zero: int) -> None:
    """ZeRO-3 keeps the model of the last forward on a module-level stack; `destroy` leaves it."""
    assert [rank[f"released{zero}"] for rank in ranks] == [True, True, True, True]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    ranks: Ranks, zero: int
) -> None:
    """By the norm alone: ZeRO-1 and 2 no longer look at each gradient before."""
    for rank in ranks:
        found = rank[f"nan{zero}"]
        assert found["skipped"] == {"experts": 0, "dense": 0}
        assert found["finite"]
        assert found["after"] > 20
        assert found["looked"] == (zero == 3)


@pytest.mark.parametrize(
    ("zero", "way"), [(z, w) for z in (1, 2, 3) for w in WAYS if (z, w) not in ANOTHER_CLASS]
)
def test_gradients_norm_and_clipping_are_zeros_own(ranks: Ranks, zero: int, way: str) -> None:
    for rank in ranks:
        found = rank[f"lean{zero} {way}"]
        assert found["lean"]["norms"] == pytest.approx(found["plain"]["norms"], rel=1e-6)
        # One micro-step's gradient of what no other rank adds to stays as it was made.
        narrow = "torch.float32" if way == "alone" else "torch.bfloat16"
        assert found["lean"]["given"] == ([] if zero == 3 or way == "shared" else [narrow])
        assert found["plain"]["given"] == []
        last = found["lean"]["norms"][-1]
        assert found["lean"]["divisor"] == pytest.approx(last / 0.05, rel=1e-4)
        assert found["lean"]["divisor"] > 2
        assert found["plain"]["divisor"] == 1.0
        assert found["difference"] < 1e-6


@pytest.mark.parametrize("model", ["", " dense"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_model_computes_with_its_masters_rounded(ranks: Ranks, zero: int, model: str) -> None:
    """The optimizer writes both, rows scaled after its step included; no rank lacks another's."""
    for rank in ranks:
        found = rank[f"written{zero}{model}"]
        assert found["written"] == (2 if model else 3)
        assert found["elements"] > 1000
        assert found["moved"] > 20
        assert found["other"] == 0


@pytest.mark.parametrize("part", ["norm", "experts"])
def test_a_parameter_without_a_gradient_has_a_gradient_of_zero(ranks: Ranks, part: str) -> None:
    """ZeRO-3 alone would give it, and add to, the one of the step before."""
    kept = {"norm": 0.9, "experts": 0.95}[part]
    for rank in ranks:
        found, other = rank["sometimes3"][part], rank["sometimes2"][part]
        assert found[0] > 0
        assert found == pytest.approx(other, rel=1e-3)  # gradients of bfloat16, added up
        assert abs(found[1] / found[0] - kept) > 0.01  # the second step had a gradient
        for first, second, third, fourth in (found, other):
            assert first > 0
            assert third == pytest.approx(kept * second, rel=1e-4)
            assert abs(fourth / third - kept) > 0.01  # its first micro-step had one


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offloaded_gradients_are_those_of_all_micro_steps_and_of_this_step(
    ranks: Ranks, zero: int
) -> None:
    """ZeRO alone keeps on the host what the last backward did not reach, of the step before."""
    for rank in ranks:
        found, expected = rank[f"sometimes{zero} offload"], rank[f"sometimes{zero}"]
        for name, lengths in expected.items():
            assert found[name] == pytest.approx(lengths, rel=1e-5)


@pytest.mark.parametrize("trainable", PARTS)
def test_zero3_reduces_the_gradients_of_a_part_as_zero1_does(ranks: Ranks, trainable: str) -> None:
    """A layer gathered whole gives its gradients too early where its input needs none."""
    for rank in ranks:
        for whole, cut in zip(rank[f"{trainable} 1"], rank[f"{trainable} 3"], strict=True):
            assert cut == pytest.approx(whole, rel=1e-6)
            assert cut[1] > 1e-3


def test_zero3_hooks_layers_and_not_what_is_in_them(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["hooks"] == {"layers": True, "inner": 0, "hooks": 0}


@pytest.mark.parametrize("ahead", AHEAD)
def test_zero3_leaves_whole_parameters_in_place(ranks: Ranks, ahead: int) -> None:
    for rank in ranks:
        found = rank[f"whole {ahead}"]
        assert found["shown"]["fetches"] == 0
        assert found["fetched"]["fetches"] > 0  # or there is nothing to leave in place
        assert found["shown"]["steps"] == found["fetched"]["steps"]
        assert found["equal"]
        assert found["compared"] > 20


def test_zero3_gathers_the_next_layer_ahead(ranks: Ranks) -> None:
    for rank in ranks:
        found = rank[f"whole {AHEAD[0]}"]
        assert found["shown"]["ahead"] == 1
        assert found["fetched"]["ahead"] < 1


def test_zero3_waits_for_gradients_once_and_does_no_more_with_that_stream() -> None:
    """epctl takes the wait away on GPUs, where no rank of these tests is."""
    backward_ends = DeepSpeedZeroOptimizer_Stage3.independent_gradient_partition_epilogue
    source = inspect.getsource(inspect.getclosurevars(backward_ends).nonlocals["func"])
    uses = re.findall(r"self\.reduce_and_partition_stream\S*", source)
    assert uses == ["self.reduce_and_partition_stream.synchronize()"]
    reduce = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
    assert callable(getattr(DeepSpeedZeroOptimizer_Stage3, reduce))
    assert source.index("__reduce_and_partition_ipg_grads(comm_dtype)") < source.index(uses[0])
