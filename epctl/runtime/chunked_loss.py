"""The loss of a large vocabulary without its logits: 163,840 words never exist at once.

Shape suffixes: B sequences, S tokens, T tokens (B*S), D hidden size.
"""

from __future__ import annotations

import types
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epctl.kernels.cross_entropy import IGNORED, chunked_cross_entropy, rows_within

# What a config says of logits that are bent after the head: no scale can stand for it.
SOFTCAP_KEYS = ("final_logit_softcapping", "output_logit_soft_cap")


class LossHead(nn.Linear):
    """A head that can give the loss: the weight is at hand (ZeRO-3) while its forward runs."""

    max_logits_bytes: int
    scale: float

    def fits(self, num_tokens: int) -> bool:
        """True if all float32 logits of so many tokens stay within the limit."""
        return num_tokens * self.out_features * 4 <= self.max_logits_bytes

    def forward(
        self,
        hidden_BSD: Tensor,
        shifted_BS: Tensor | None = None,
        divisor: Tensor | float = 1.0,
    ) -> Tensor:
        """Returns logits, or with targets the summed float32 loss over them, divided."""
        if shifted_BS is None:
            return super().forward(hidden_BSD)
        x_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        num_rows = rows_within(self.max_logits_bytes, x_TD, self.out_features)
        labels_T = shifted_BS.reshape(-1)
        options: dict[str, Any] = {"num_rows": num_rows, "scale": self.scale, "divisor": divisor}
        return chunked_cross_entropy(x_TD, self.weight, labels_T, **options)


def limit_logits(model: Any, max_logits_bytes: int) -> str | None:
    """Makes the loss of a transformers causal LM in blocks once its logits pass a limit.

    Below the limit, and without labels, the model's own forward runs.

    Returns None, or why the model keeps its own way (its logits are not a scaled product).
    """
    head, config = model.get_output_embeddings(), model.config
    if type(head) is not nn.Linear or head.bias is not None:
        return f"the head is a {type(head).__name__}, not a plain product"
    for key in SOFTCAP_KEYS:
        if getattr(config, key, None):
            return f"logits are bent by `{key}`"
    head.__class__ = LossHead
    head = cast(LossHead, head)
    head.max_logits_bytes = max_logits_bytes
    head.scale = logits_scale(config)
    model.forward = types.MethodType(_forward, model)
    return None


def logits_scale(config: Any) -> float:
    """Returns what the model multiplies its logits by: Granite divides, Cohere multiplies."""
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return float(getattr(config, "logit_scale", None) or 1.0) / float(divisor)


def _forward(
    model: Any,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **inputs: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    head = model.get_output_embeddings()
    targets = labels if shift_labels is None else shift_labels
    if targets is None or head.fits(targets.numel()):
        of_the_loss = {
            "labels": labels,
            "num_items_in_batch": num_items_in_batch,
            "shift_labels": shift_labels,
        }
        given = {key: value for key, value in of_the_loss.items() if value is not None}
        return type(model).forward(model, input_ids=input_ids, **given, **inputs)
    shifted_BS = _shifted(targets) if shift_labels is None else shift_labels
    hidden_BSD = model.base_model(input_ids=input_ids, **inputs).last_hidden_state
    divisor = num_items_in_batch
    if divisor is None:  # transformers then takes the mean
        divisor = (shifted_BS != IGNORED).sum()
    if torch.is_tensor(divisor):
        divisor = divisor.to(hidden_BSD.device)
    loss = head(hidden_BSD, shifted_BS, divisor)
    return CausalLMOutputWithPast(loss=loss)


def _shifted(labels_BS: Tensor) -> Tensor:
    """Returns each token's target: the label of the next one."""
    return F.pad(labels_BS, (0, 1), value=IGNORED)[..., 1:]
