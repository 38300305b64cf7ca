"""Held-out loss and a sampled continuation, by all ranks together.

Every rank must call the same modules in the same order (experts and ZeRO-3 partitions live on
other ranks), so ranks sample the same prompt in lockstep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from epctl.runtime.data_batch import Batch


@torch.no_grad()
def held_out_loss(engine: Any, batches: Iterable[Batch], sp_size: int = 1) -> float:
    """Returns the mean loss over all targets of every rank's batches, float64 sums.

    `sp_size` ranks hold the same batch and give a share of its loss each. NaN if there is no
    target at all: zero would look like a perfect model.
    """
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in batches:
        inputs = batch.to(engine.device).model_inputs()
        loss = engine(**inputs, num_items_in_batch=1).loss
        total[0] += loss.double()
        total[1] += batch.num_targets / sp_size
    dist.all_reduce(total)
    engine.train()
    return float(total[0] / total[1])


@torch.no_grad()
def sample_continuation(
    engine: Any,
    prompt_ids: list[int],
    num_tokens: int,
    *,
    seed: int,
    temperature: float = 0.7,
    images: Mapping[str, torch.Tensor] | None = None,
) -> list[int]:
    """Returns `num_tokens` sampled token ids after the prompt, the same on every rank.

    Args:
        images: what a vision-language model is given beside the prompt's ids.
    """
    engine.eval()
    beside = {name: value.to(engine.device) for name, value in (images or {}).items()}
    generator = torch.Generator().manual_seed(seed)
    ids_1S = torch.tensor([prompt_ids], device=engine.device)
    cache = None
    sampled: list[int] = []
    for _ in range(num_tokens):
        result = engine(input_ids=ids_1S, past_key_values=cache, use_cache=True, **beside)
        beside = {}
        cache = result.past_key_values
        # A run that diverged still ends in order: what is not finite has no say in the draw.
        scores = result.logits[0, -1].float().cpu().nan_to_num(0.0, 0.0, -1e30) / temperature
        choice = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
        token = choice.to(engine.device)
        dist.broadcast(token, src=0)  # rounding may differ between ranks; the text may not
        sampled.append(int(token))
        ids_1S = token.view(1, 1)
    engine.train()
    return sampled
