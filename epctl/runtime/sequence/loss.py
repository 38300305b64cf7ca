"""The loss of cut sequences: local sum over global valid tokens.

Shape suffixes: B sequences, S all tokens, R tokens of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def shifted_targets(labels_BS: Tensor) -> Tensor:
    """Returns each token's target, the label of the next one; the last has none."""
    return F.pad(labels_BS, (0, 1), value=IGNORED)[:, 1:]


def local_targets(labels_BS: Tensor, start: int, stop: int) -> Tensor:
    """Returns the targets [B, R] of the rows from `start` to `stop`.

    Shifted before the cut: the target of a rank's last token lies with the next rank.
    """
    return shifted_targets(labels_BS)[:, start:stop].contiguous()


def divisor(labels_BS: Tensor, num_ranks: int) -> Tensor:
    """Returns what a rank divides its summed loss by if nobody says.

    Global valid tokens over ranks: gradients are averaged over the ranks afterwards, so each
    rank's loss counts `num_ranks` times. At least one, so a batch without targets is zero.
    """
    count = (shifted_targets(labels_BS) != IGNORED).sum()
    return count.clamp_min(1).to(torch.float32) / num_ranks
