"""Logits and loss: whole as transformers makes them, or in blocks (runtime/chunked_loss.py)."""

from __future__ import annotations

from collections.abc import Iterator

from epctl.launch.memory_settings import RankPlan
from epctl.launch.memory_shape import ModelShape
from epctl.launch.memory_terms import Phase, Term


def loss_terms(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    """Yields what the head and the loss hold."""
    tokens, vocab, width = plan.num_tokens, shape.vocab_size, plan.width
    if not vocab:
        return
    hidden = tokens * shape.hidden_size
    yield Term(
        "final norm", "loss", hidden * (4 + 2 * width),
        f"(4 + 2 x {width}) B x T x D", Phase.LOSS, values={"T": tokens, "D": shape.hidden_size},
    )  # fmt: skip
    if tokens * vocab * 4 <= plan.logits_bytes:
        yield from _whole(tokens * vocab, plan)
    else:
        yield from _in_blocks(shape, plan)


def _whole(logits: float, plan: RankPlan) -> Iterator[Term]:
    values = {"T x V": logits}
    # transformers widens them, log_softmax keeps its result, and its backward makes two more.
    yield Term(
        "logits in float32", "loss", 12 * logits,
        "3 x 4 B x T x V: log-softmax, its gradient, that of the logits", Phase.LOSS,
        values=values,
    )  # fmt: skip
    copies = 2 if plan.accumulation > 1 else 1
    yield Term(
        "logits", "loss", plan.width * logits,
        f"{plan.width} B x T x V; the model's result holds them through backward and step",
        Phase.ALWAYS, values=values,
    )  # fmt: skip
    if copies > 1:
        yield Term(
            "logits of the micro-step before", "loss", plan.width * logits,
            f"{plan.width} B x T x V, until the next result takes its place", Phase.LOSS,
            values=values,
        )  # fmt: skip


def _in_blocks(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    tokens, width = plan.num_tokens, plan.width
    rows = min(tokens, max(1.0, plan.logits_bytes // (4 * shape.vocab_size)))
    yield Term(
        "a block of logits", "loss", 8 * rows * shape.vocab_size,
        "2 x 4 B x R x V: logits in float32 and a temporary; R = train.logits_mib / 4 V",
        Phase.LOSS, values={"V": shape.vocab_size, "R": rows},
    )  # fmt: skip
    # Added up in float32 over blocks, and once more in the dtype of the weight when it is given.
    head = 4 + (width if width < 4 else 0)
    yield Term(
        "gradients of the head and its input", "loss",
        head * shape.num_head_elements + 2 * width * tokens * shape.hidden_size,
        f"{head} B x V x D + 2 x {width} B x T x D", Phase.LOSS,
        values={"V": shape.vocab_size, "D": shape.hidden_size, "T": tokens},
    )  # fmt: skip
