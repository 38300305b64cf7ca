"""What a person sees of a layout: one compact card, readable without colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from epctl.layout.model import ModelLayout, MoELayout, ParameterCounts, VisionLayout
from epctl.layout.names import format_ranges
from epctl.output import format_bytes, format_count

BAR_CELLS = 32
LABEL_CELLS, PADDING_CELLS = 18, 2
SHORTEST_REASON, LONGEST_REASON = 16, 44
_PARTS = (
    ("routed_experts", "routed experts"),
    ("shared_experts", "shared experts"),
    ("dense", "dense"),
    ("vision", "vision"),
    ("embeddings", "embeddings, head"),
)
_BESIDE = (("buffers", "buffers"), ("scales", "scales"), ("mtp", "MTP layers"))
Row = tuple[str, str, str]


def layout_card(
    layout: ModelLayout, memory: Sequence[Mapping[str, Any]] = (), assumed: str = ""
) -> RenderableType:
    """Returns the card of a layout as a rich renderable, with memory rows where there are any."""
    blocks: list[RenderableType] = [_title(layout), _parameters(layout.parameters)]
    if layout.moe:
        blocks.append(_Facts("Mixture of experts", _moe_rows(layout.moe), layout.reasons))
        blocks.append(_Facts("Router", _router_rows(layout.moe), layout.reasons))
    if layout.vision:
        blocks.append(_Facts("Vision", _vision_rows(layout.vision), layout.reasons))
    blocks.append(_Facts("Parallel sizes", _parallel_rows(layout), {}))
    if memory:
        blocks.append(_memory(memory, assumed))
    if layout.warnings:
        blocks.append(_warnings(layout.warnings))
    return Group(*(item for block in blocks for item in (block, Text(""))))


def _memory(rows: Sequence[Mapping[str, Any]], assumed: str) -> Table:
    table = _grid(f"Memory a GPU, predicted: {assumed} (more: epctl plan)", "lrrl")
    for row in rows:
        gpus = f"{row['gpus']:,} {'GPU' if row['gpus'] == 1 else 'GPUs'}, ep {row['ep']}"
        if row["sequence_length"] != rows[0]["sequence_length"]:
            gpus += f", sp {row['sp']}, {row['sequence_length']:,} tokens"
        state = f"state {format_bytes(row['state_bytes'])}"
        table.add_row(gpus, state, f"needed {format_bytes(row['needed_bytes'])}", "")
    return table


def _warnings(warnings: Iterable[str]) -> Table:
    table = _grid("Warnings", "l")
    for warning in warnings:
        table.add_row(Text(f"! {warning}", style="yellow"))
    return table


def _title(layout: ModelLayout) -> Text:
    text = Text(layout.id, style="bold")
    facts = [layout.architecture or "architecture not stated", layout.model_type or ""]
    facts += [f"family {layout.family}" if layout.family else "no family: generic rule"]
    text.append("\n" + ", ".join(fact for fact in facts if fact), style="not bold")
    where = f"source: {layout.source}"
    if layout.revision:
        where += f" at {layout.revision}"
    size = f"{layout.num_tensors:,} tensors"
    size += f", {format_bytes(layout.num_bytes)}" if layout.num_bytes else ""
    text.append(f"\n{where}; {size}, mostly {layout.dtype}", style="not bold")
    return text


def _parameters(counts: ParameterCounts) -> Table:
    active = (
        f", {format_count(counts.active_per_token)} active per token"
        if counts.active_per_token is not None and counts.active_per_token != counts.total
        else ""
    )
    table = _grid(f"Parameters: {format_count(counts.total)}{active}", "lrrl")
    for key, label in _PARTS:
        value = getattr(counts, key)
        if value:
            share = value / counts.total
            cells = max(1, round(share * BAR_CELLS))
            bar = Text("#" * cells, no_wrap=True, overflow="crop")
            table.add_row(label, format_count(value), f"{share:6.1%}", bar)
    for key, label in _BESIDE:
        value = getattr(counts, key)
        if value:
            table.add_row(label, format_count(value), "", "beside the total")
    return table


def _grid(title: str, columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False,
        padding=(0, PADDING_CELLS, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column(no_wrap=columns != "l", min_width=LABEL_CELLS)
    for column in columns[1:]:
        table.add_column(justify="right" if column == "r" else "left", overflow="fold")
    return table


class _Facts:
    """Rows of label, value and reason; the reasons get what room the values leave, or none.

    A reason is a courtesy, cut to its line: `--json` has it in full.
    """

    def __init__(self, title: str, rows: Iterable[Row], reasons: Mapping[str, str]) -> None:
        self.title = title
        self.rows = [(label, value, _reason(key, reasons)) for label, value, key in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _grid(self.title, "ll")
        values = max((cell_len(value) for _, value, _ in self.rows), default=0)
        room = options.max_width - LABEL_CELLS - values - 2 * PADDING_CELLS
        shown = room >= SHORTEST_REASON and any(reason for _, _, reason in self.rows)
        if shown:
            table.add_column(no_wrap=True, overflow="ellipsis", max_width=min(room, LONGEST_REASON))
        for label, value, reason in self.rows:
            table.add_row(label, value, *([Text(reason, style="dim")] if shown else []))
        yield table


def _reason(key: str, reasons: Mapping[str, str]) -> str:
    return reasons.get(key, "").removeprefix("config ")


def _moe_rows(moe: MoELayout) -> list[Row]:
    layers = f"{len(moe.layers)} ({format_ranges(moe.layers)})"
    if moe.dense_layers:
        layers += f", dense {format_ranges(moe.dense_layers)}"
    rows = [
        ("layers", layers, "moe.layers"),
        ("experts", f"{moe.num_experts}, top {moe.top_k or '?'}", "moe.num_experts"),
        ("expert width", f"{moe.expert_intermediate_size} of hidden {moe.hidden_size}", ""),
        ("storage", moe.storage.label, "moe.expert_storage"),
    ]
    if moe.shared_experts:
        shared = moe.shared_experts
        gate = ", gated" if shared.gate else ""
        text = f"{shared.num_experts}, width {shared.intermediate_size}{gate}"
        rows.append(("shared experts", text, "moe.shared_experts"))
    if moe.untrainable:
        rows.append(("training", f"no: {moe.untrainable}", ""))
    return rows


def _router_rows(moe: MoELayout) -> list[Row]:
    router = moe.router
    score = router.score_func or "not known"
    if router.score_after_selection:
        score += " of the chosen logits"
    rows = [
        ("weight", router.weight or "not found", "moe.router.weight"),
        ("score", score, "moe.router.score_func"),
        ("top_k", str(moe.top_k or "not known"), "moe.top_k"),
        ("normalize", _yes_no(router.normalize), "moe.router.normalize"),
        ("scale", _known(router.scale), "moe.router.scale"),
    ]
    if router.correction_bias:
        rows.append(("correction bias", router.correction_bias, "moe.router.correction_bias"))
    if router.num_groups > 1:
        text = f"{router.top_groups} of {router.num_groups}, by {router.group_score}"
        rows.append(("groups", text, "moe.router.num_groups"))
    return rows


def _yes_no(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"


def _known(value: float | None) -> str:
    return "not known" if value is None else f"{value:g}"


def _vision_rows(vision: VisionLayout) -> list[Row]:
    attention = vision.attention
    heads = f"{_or_unknown(attention.num_heads)} heads"
    tower = f"{attention.num_layers} layers, {heads}, width {_or_unknown(attention.hidden_size)}"
    rows = [("tower", f"`{vision.tower_prefix or '(top)'}` {tower}", "")]
    if vision.projector_prefix:
        rows.append(("projector", f"`{vision.projector_prefix}`", ""))
    if vision.decoder_prefix is not None:
        rows.append(("decoder", f"`{vision.decoder_prefix}`", ""))
    patch = f"{_or_unknown(vision.patch_size)} pixels"
    if vision.merge_size:
        patch += f", merged {vision.merge_size} x {vision.merge_size}"
    if vision.temporal_patch_size:
        patch += f", {vision.temporal_patch_size} frames"
    rows.append(("patch", patch, "vision.patch_size"))
    if vision.windowed_layers:
        text = f"{len(vision.windowed_layers)} of {attention.num_layers} layers"
        text += f", {vision.window_size} pixels"
        rows.append(("windows", text, "vision.full_layers"))
    if vision.cut_units:
        rows.append(("SP cuts between", ", else ".join(vision.cut_units), ""))
    if vision.image_token_id is not None:
        rows.append(("image token", str(vision.image_token_id), "vision.image_token_id"))
    if vision.placeholder:
        rows.append(("placeholders", vision.placeholder, ""))
    return rows


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else str(value)


def _parallel_rows(layout: ModelLayout) -> list[Row]:
    rows = []
    if layout.moe:
        rows.append(("EP sizes", " ".join(map(str, layout.ep_sizes)), ""))
    if layout.sequence_parallel:
        rows.append(("SP sizes", " ".join(map(str, layout.sp_sizes)), ""))
        refused: dict[str, list[int]] = {}
        for entry in layout.sequence_parallel:
            if not entry.legal:
                refused.setdefault(entry.reason, []).append(entry.size)
        for reason, sizes in refused.items():
            rows.append(("", f"not {', '.join(map(str, sizes))}: {reason}", ""))
    return rows
