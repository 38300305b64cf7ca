"""What `epctl bench moe` measures: shapes by model name, and routings."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from epctl.errors import ConfigError

Routing = Literal["natural", "balanced", "zipf"]

ROUTINGS: tuple[Routing, ...] = get_args(Routing)


class MoEShape(NamedTuple):
    """One MoE block: hidden size, expert intermediate size, experts, experts a token."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    def forward_flops(self, tokens: int) -> int:
        """Returns the counted arithmetic of a forward: three products a row, two a number."""
        return 6 * tokens * self.top_k * self.hidden * self.intermediate


MOE_SHAPES: dict[str, MoEShape] = {
    "moonlight": MoEShape(2048, 1408, 64, 6),
    "qwen3-30b": MoEShape(2048, 768, 128, 8),
    "deepseek-v3": MoEShape(7168, 2048, 256, 8),
    "mixtral": MoEShape(4096, 14336, 8, 2),
    "gpt-oss-20b": MoEShape(2880, 2880, 32, 4),
}


def parse_shape(text: str) -> MoEShape:
    """Returns the shape named `text`, or given as `hidden,intermediate,experts,top_k`.

    Raises:
        ConfigError: neither a known name nor four positive numbers with top_k <= experts.
    """
    if text in MOE_SHAPES:
        return MOE_SHAPES[text]
    parts = text.split(",")
    known = ", ".join(MOE_SHAPES)
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(
            f"shape {text!r} is neither a known name ({known}) nor four numbers",
            hint="hidden, expert intermediate, experts, top-k: `--shape 2048,1408,64,6`",
        )
    shape = MoEShape(*(int(part) for part in parts))
    if min(shape) < 1 or shape.top_k > shape.num_experts or shape.num_experts > shape.hidden:
        raise ConfigError(
            f"shape {text!r} cannot run: top-k <= experts <= hidden, all positive, is needed"
        )
    return shape


def parse_routing(text: str) -> Routing:
    """Returns the routing named `text`, or raises ConfigError with the known ones."""
    for routing in ROUTINGS:
        if text == routing:
            return routing
    raise ConfigError(f"routing {text!r} is unknown; known: {', '.join(ROUTINGS)}")
