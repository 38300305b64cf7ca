"""What one optimizer step needs on top of state and gradients (runtime/optimizer.py)."""

from __future__ import annotations

from collections.abc import Iterator

from epctl.launch.memory_settings import RankPlan
from epctl.launch.memory_shape import ModelShape
from epctl.launch.memory_state import LocalCounts, largest_step, local_counts
from epctl.launch.memory_terms import Phase, Term

# Elements a rank orthogonalises at once unless one matrix is larger: 188 MB in float32, and a
# small multiple of that in the iteration. Sixteen of Moonlight's experts: four whole waves of tiles
# on an H100's 132 processors, and products that take longer than the host needs to launch them.
# Here, where torch is not loaded, for the plan and for runtime/muon_exchange.py.
MUON_CHUNK_ELEMENTS = 47_000_000


def step_terms(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    """Yields the temporaries of Muon and the engine; AdamW's fused kernel has none."""
    local = local_counts(shape, plan)
    if plan.zero > 0 and plan.gradient_bytes < 4 and not plan.offload:
        largest = largest_step(local, plan)
        yield Term(
            "gradient in float32", "optimizer work", 6 * largest,
            "(2 + 4) B x the largest group's partition: flattened, then widened", Phase.STEP,
            values={"elements": largest},
        )  # fmt: skip
    if plan.optimizer == "muon" and local.trained("elements", kind="muon"):
        yield _muon_workspace(shape, local, plan)


def _muon_workspace(shape: ModelShape, local: LocalCounts, plan: RankPlan) -> Term:
    matrices = [f.shape[-1] * f.shape[-2] for f in shape.families if f.kind == "muon" and f.trained]
    largest = max(matrices)
    held = local.trained("elements", kind="muon")
    chunk = max(largest, min(MUON_CHUNK_ELEMENTS, held))
    travels = chunk if plan.num_ranks > 1 else 0
    return Term(
        "Muon's matrices at work", "optimizer work", 16 * chunk + 8 * travels,
        "16 B x chunk: matrices assembled, normalised and at work in half precision; "
        "8 B x chunk travels to and from owners",
        Phase.STEP, values={"chunk": chunk, "largest matrix": largest},
    )  # fmt: skip
