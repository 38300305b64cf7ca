"""What an expert does between its two projections: a function, and how gate and up meet in it.

Shape suffixes: see reference.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

ActivationFunction = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
GateForm = Literal["product", "clamped", "clamped_after", "shifted"]

ACTIVATION_FUNCTIONS: tuple[str, ...] = get_args(ActivationFunction)
GATE_FORMS: tuple[str, ...] = get_args(GateForm)


class Activation(NamedTuple):
    """How an expert's pre-activations become its hidden values; f is `function`, c is `limit`.

    Attributes:
        function: `silu`, `gelu` (erf), `gelu_tanh`, `relu` or `relu2` (squared).
        form: `product` f(gate) * up, or f(up) for experts without a gate;
            `clamped` f(min(gate, c)) * clip(up, -c, c) (DeepSeek-V4, GLM-5-Next, Hunyuan-V4);
            `clamped_after` min(f(gate), c) * clip(up, -c, c) (Step-3.5);
            `shifted` (clip(up, -c, c) + 1) * g * sigmoid(alpha * g), g = min(gate, c) (GPT-OSS).
        limit: c; None in `product`, and where a layer of the other forms has none.
        alpha: of `shifted` alone, 1.702 in published models.
    """

    function: ActivationFunction = "silu"
    form: GateForm = "product"
    limit: float | None = None
    alpha: float = 1.702

    @property
    def is_swiglu(self) -> bool:
        """True for plain SwiGLU, which the kernels were measured with."""
        return self.function == "silu" and self.form == "product"

    def check(self, *, gated: bool) -> None:
        """Raises ValueError for a combination that no implementation can follow."""
        if self.function not in ACTIVATION_FUNCTIONS:
            known = ", ".join(ACTIVATION_FUNCTIONS)
            raise ValueError(f"activation function is {self.function!r}; known: {known}")
        if self.form not in GATE_FORMS:
            raise ValueError(f"gate form is {self.form!r}; known: {', '.join(GATE_FORMS)}")
        if not gated and self.form != "product":
            raise ValueError(f"experts without a gate have no gate form {self.form!r}")
        if self.limit is not None and (self.form == "product" or not self.limit > 0):
            raise ValueError(f"limit {self.limit} with gate form {self.form!r}")

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Returns the hidden values, in the dtype of `up`; `gate` is None without a gate."""
        if gate is None:
            return self.apply_function(up)
        if self.form == "product":
            return self.apply_function(gate) * up
        bound = float("inf") if self.limit is None else self.limit
        up = up.clamp(-bound, bound)
        if self.form == "clamped":
            return self.apply_function(gate.clamp(max=bound)) * up
        if self.form == "clamped_after":
            return self.apply_function(gate).clamp(max=bound) * up
        gate = gate.clamp(max=bound)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def apply_function(self, values: Tensor) -> Tensor:
        """Returns the function of each value."""
        if self.function == "silu":
            return F.silu(values)
        if self.function == "gelu":
            return F.gelu(values)
        if self.function == "gelu_tanh":
            return F.gelu(values, approximate="tanh")
        rectified = F.relu(values)
        return rectified if self.function == "relu" else rectified.square()


SWIGLU = Activation()


class ExpertBiases(NamedTuple):
    """Biases of the three projections: gate and up [E, I], down [E, D]; None where absent."""

    gate_EI: Tensor | None = None
    up_EI: Tensor | None = None
    down_ED: Tensor | None = None


NO_BIASES = ExpertBiases()
