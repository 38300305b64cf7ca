"""Bytes of one rank before anything runs: every term with its formula, and the peak they make.

The owner of predicted bytes: `epctl plan`, `inspect`, the dry run and the train panel ask here.
Pure and torch-free. The peak is what torch's allocator would report; the CUDA context and
fragmentation come on top of it where the question is whether a GPU holds the run.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from epctl.launch.memory_activations import activation_terms, vision_terms
from epctl.launch.memory_gradients import gather_terms, gradient_terms
from epctl.launch.memory_loss import loss_terms
from epctl.launch.memory_settings import RankPlan
from epctl.launch.memory_shape import ModelShape
from epctl.launch.memory_state import state_terms
from epctl.launch.memory_step import step_terms
from epctl.launch.memory_terms import PHASES, Group, Phase, Place, Term, total, total_of

# Not measured: what the driver, NCCL and libraries take of a GPU before the first tensor.
CONTEXT_BYTES = 2**30
# Not measured: share of the peak that the allocator holds and cannot use (segments that grow).
FRAGMENTATION = 0.03
# Python, torch and DeepSpeed of a CPU rank, measured 2026-11-22: 620 MiB resident in a run of the
# embedded model whose tensors take some 40 MiB.
HOST_PROCESS_BYTES = 580 * 2**20


@dataclass(frozen=True, slots=True)
class Prediction:
    """All terms of a rank."""

    terms: tuple[Term, ...]

    @property
    def peak_phase(self) -> Phase:
        """Returns the phase in which the device's memory peaks."""
        return max(PHASES, key=lambda phase: total(self.terms, phase))

    @property
    def peak_bytes(self) -> float:
        """Returns the peak of allocated bytes on the device."""
        return total(self.terms, self.peak_phase)

    @property
    def needed_bytes(self) -> float:
        """Returns what a device must have: the peak, fragmentation and context."""
        return self.peak_bytes + sum(term.num_bytes for term in reserve_terms(self.peak_bytes))

    @property
    def host_bytes(self) -> float:
        """Returns the peak of bytes in host memory that offload puts there."""
        return max(total(self.terms, phase, "host") for phase in PHASES)

    def of(self, group: Group) -> float:
        """Returns the bytes of a group of terms, on the device and on the host."""
        return total_of(self.terms, group)

    @property
    def state_bytes(self) -> float:
        """Returns parameters, masters and optimizer state: what a step finds and leaves."""
        groups: tuple[Group, ...] = ("parameters", "masters", "optimizer state")
        return sum(self.of(group) for group in groups)


def predict(shape: ModelShape, plan: RankPlan) -> Prediction:
    """Returns the bytes of the fullest rank of a plan."""
    assert plan.num_ranks % plan.ep == 0, f"{plan.num_ranks} ranks, ep {plan.ep}"
    assert plan.num_ranks % plan.sp == 0, f"{plan.num_ranks} ranks, sp {plan.sp}"
    # The engine's part is the same for every micro-batch: a planner asks for it again and again.
    engine = dataclasses.replace(
        plan, micro_batch=1, sequence_length=1, sp=1, checkpointing="none", is_packed=False,
        accumulation=min(plan.accumulation, 2), imbalance=1.0, patches=0, logits_bytes=0.0,
    )  # fmt: skip
    tokens = (
        *activation_terms(shape, plan),
        *vision_terms(shape, plan),
        *loss_terms(shape, plan),
    )
    terms = (*_engine_terms(shape, engine), *tokens)
    return Prediction(tuple(term for term in terms if term.num_bytes))


@functools.lru_cache(maxsize=8192)
def _engine_terms(shape: ModelShape, plan: RankPlan) -> tuple[Term, ...]:
    """Returns what does not depend on the tokens of a micro-batch."""
    return (
        *state_terms(shape, plan),
        *gradient_terms(shape, plan),
        *gather_terms(shape, plan),
        *step_terms(shape, plan),
    )


def reserve_terms(peak: float) -> tuple[Term, Term]:
    """Returns what a GPU needs beside the allocated peak; both are assumptions, not measured."""
    return (
        Term(
            "fragmentation", "reserve", FRAGMENTATION * peak,
            f"{FRAGMENTATION:.0%} of the peak (assumed)", on_peak=False,
        ),
        Term(
            "CUDA context, NCCL, libraries", "reserve", CONTEXT_BYTES, "1 GiB (assumed)",
            on_peak=False,
        ),
    )  # fmt: skip


def cpu_bytes(prediction: Prediction) -> float:
    """Returns what a CPU rank takes of its host: everything, and the process itself."""
    return prediction.peak_bytes + prediction.host_bytes + HOST_PROCESS_BYTES


def relative_error(predicted: float, measured: float) -> float:
    """Returns how far the prediction is off, as a share of what was measured."""
    return (predicted - measured) / measured


__all__ = ["Place", "Prediction", "cpu_bytes", "predict", "relative_error", "reserve_terms"]
