"""The gate of `epctl bench multimodal-sp`: loss and gradient of every mode are one rank's own.

In float32 within a tolerance; on GPUs the direction of the bfloat16 gradient too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.bench.multimodal_sp_modes import Mode, sharded, wrap_with_deepspeed
from epctl.bench.multimodal_sp_workloads import CPU, GPU_GATE, Size, Workload, build_model
from epctl.runtime.sequence.group import SequenceGroup

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
COSINE_NEEDED = 0.999  # of bfloat16 gradients
# Below this share of the largest a gradient is zero but for rounding: a bias on keys.
ZERO = 1e-6

Gradients = list[tuple[str, Tensor]]
Errors = dict[str, float]


@dataclass(frozen=True)
class Reference:
    """A workload's model on one rank, with the loss and the gradients that every mode must give."""

    workload: Workload
    model: nn.Module
    inputs: dict[str, Tensor]
    loss: float
    gradients: Gradients


class Gate:
    """One process of the comparison.

    Args:
        groups: the ranks that share a sample, by their number.
        write: takes an event; only rank 0's is kept.
    """

    def __init__(
        self,
        device: torch.device,
        rank: int,
        groups: dict[int, SequenceGroup],
        write: Callable[..., None],
    ) -> None:
        self.device = device
        self.rank = rank
        self.groups = groups
        self.write = write

    def check(self, workload: Workload) -> dict[tuple[int, str], Errors]:
        """Returns the errors of every mode, all within the tolerances; else the run is over."""
        on_gpu = self.device.type == "cuda"
        model, inputs = self._made(workload, GPU_GATE if on_gpu else CPU, torch.float32)
        reference = Reference(workload, model, inputs, *_step(model, inputs))
        errors: dict[tuple[int, str], Errors] = {}
        for size in self.groups:
            for mode in workload.modes:
                found = self._errors(reference, size, mode)
                if on_gpu:
                    found |= self._cosine(reference, size, mode)
                errors[size, mode] = found
                if not _is_green(found):
                    where = f"{workload.name}, {mode}, {size} ranks"
                    self.write(red=f"{where}: {_told(found)}")
                    dist.barrier()  # nobody ends before it is written
                    raise SystemExit(7)
        self._peer(reference)
        return errors

    def _errors(self, reference: Reference, size: int, mode: Mode) -> Errors:
        found: Errors = {}
        if self.rank < size:
            group = self.groups[size]
            with sharded(reference.model, group, mode):
                own_loss, gradients = _step(reference.model, reference.inputs)
            mean = torch.tensor(own_loss, dtype=torch.float64, device=self.device)
            dist.all_reduce(mean, group=group.group)
            _average(gradients, group, size)
            error = worst_error(gradients, reference.gradients)
            found = {"loss": abs(float(mean) / size - reference.loss), "gradient": error}
        return self._from_rank_0(found)

    def _cosine(self, reference: Reference, size: int, mode: Mode) -> Errors:
        """Returns the cosine of the whole bfloat16 gradient with the unsharded float32 one."""
        found: Errors = {}
        if self.rank < size:
            group = self.groups[size]
            model, inputs = self._made(reference.workload, GPU_GATE, torch.bfloat16)
            with sharded(model, group, mode):
                _, gradients = _step(model, inputs)
            _average(gradients, group, size)
            found = {"bfloat16_cosine": cosine(gradients, reference.gradients)}
        return self._from_rank_0(found)

    def _from_rank_0(self, found: Errors) -> Errors:
        box = [found]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def _peer(self, reference: Reference) -> None:
        """Runs DeepSpeed's own wrapper where it knows the model, and tells how far off it is."""
        model, size = reference.model, max(self.groups)
        group, before = self.groups[size], list(model.named_parameters())
        if self.rank >= size:
            return
        name = f"DeepSpeed's auto_wrap_model_for_sp on {reference.workload.family}"
        try:
            num_wrapped = wrap_with_deepspeed(model, group)
        except ValueError as error:
            self.write(absent=name, reason=str(error).split(".")[0][:120])
            return
        if not num_wrapped:
            self.write(absent=name, reason="it wraps no layer: every rank computes everything")
            return
        result = model(**reference.inputs, use_cache=False)
        result.loss.backward()
        gradients = [(n, _or_zero(p)) for n, p in before]
        _average(gradients, group, size)
        off = abs(float(result.loss.detach()) - reference.loss)
        self.write(absent=name, reason=_how_red(gradients, reference.gradients, off))

    def _made(
        self, workload: Workload, size: Size, dtype: torch.dtype
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        config, inputs, _ = workload.build(size)
        model = build_model(config, self.device, torch.float32).to(dtype)
        return model, {key: value.to(self.device) for key, value in inputs.items()}


def _step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, Gradients]:
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    gradients = [(name, _or_zero(p).clone()) for name, p in model.named_parameters()]
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def _or_zero(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def _average(gradients: Gradients, group: SequenceGroup, size: int) -> None:
    for _, gradient in gradients:
        dist.all_reduce(gradient, group=group.group)
        gradient /= size


def worst_error(
    found: Gradients, expected: Gradients, everything: Gradients | None = None
) -> float:
    """Returns the largest relative error of any parameter's gradient.

    Args:
        everything: the whole gradient, if `expected` is a part of it: it says what is zero.
    """
    zero = ZERO * max(float(gradient.norm()) for _, gradient in everything or expected)
    worst = 0.0
    for (_, own), (_, reference) in zip(found, expected, strict=True):
        distance, norm = float((own - reference).norm()), float(reference.norm())
        if distance != distance:
            return float("inf")
        if norm > zero or distance > zero:
            worst = max(worst, distance / max(norm, zero))
    return worst


def cosine(found: Gradients, expected: Gradients) -> float:
    """Returns the cosine between two whole gradients, in float64."""
    dot = left = right = 0.0
    for (_, own), (_, reference) in zip(found, expected, strict=True):
        a, b = own.double().flatten(), reference.double().flatten()
        dot += float(a @ b)
        left += float(a @ a)
        right += float(b @ b)
    return float(dot / (left * right) ** 0.5)


def _how_red(gradients: Gradients, expected: Gradients, off: float) -> str:
    pairs = zip(gradients, expected, strict=True)
    each = [worst_error([own], [wanted], expected) for own, wanted in pairs]
    wrong = sum(error > GRADIENT_TOLERANCE for error in each)
    return (
        f"gate red: {wrong} of {len(each)} gradients are off, the worst by {max(each):.0%}, "
        f"the loss by {off:.1e}"
    )


def _is_green(errors: Errors) -> bool:
    exact = errors["loss"] <= LOSS_TOLERANCE and errors["gradient"] <= GRADIENT_TOLERANCE
    return exact and errors.get("bfloat16_cosine", 1.0) > COSINE_NEEDED


def _told(errors: Errors) -> str:
    needed = (
        f"{LOSS_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e} are allowed, "
        f"a cosine above {COSINE_NEEDED}"
    )
    return ", ".join(f"{key} {value:.2e}" for key, value in errors.items()) + f"; {needed}"
