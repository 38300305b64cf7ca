"""ModelLayout: the noun that inspect, convert, plan and train share. Immutable, no torch.

Words: a *layer prefix* is the text before a layer's own names (`model.layers.3`); storage names
are relative to it (`mlp.experts.{expert}.gate_proj.weight`). H is the width of the hidden state,
I the width of an expert, E the number of routed experts of a layer. A projection matrix is
[out, in] as in `nn.Linear`: gate and up [I, H], down [H, I].

Every decision has its reason in `ModelLayout.reasons`, keyed by a dotted path such as
`moe.router.scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from epctl.errors import LayoutError

Projection = Literal["gate", "up", "down"]
StorageKind = Literal["per_expert", "fused", "stacked", "flat_rows"]
Part = Literal["all", "first_half", "second_half", "even", "odd"]


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """Where one projection of one expert lies in the checkpoint.

    Take `name`; if `index` is set take that position of dim 0 (`flat_rows`: rows
    `index * rows` to `(index + 1) * rows` instead); then take `part` of dim `part_dim` of what is
    left; then transpose if `transposed`. The result is [out, in].
    """

    name: str
    index: int | None
    rows: int | None
    part: Part
    part_dim: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class ExpertStorage:
    """How the routed experts of a layer are stored.

    `names` maps a stored tensor (`gate`, `up`, `down` or the fused `gate_up`) to its name below
    the layer prefix, with `{expert}` when each expert has its own. `per_expert`: [out, in] each;
    `fused`: [E, 2I, H] and [E, H, I]; `stacked`: gate, up, down with a leading E; `flat_rows`:
    gate, up, down each [E*I, H]. `transposed`: the last two dims are [in, out]. `interleaved`:
    even columns are gate, odd ones up, instead of two halves. `scales` and `biases` have the keys
    of `names`. `block_size` is that of `fp8_block` scales, (128, 128) in published models.
    """

    kind: StorageKind
    names: Mapping[str, str]
    transposed: bool = False
    interleaved: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None
    block_size: tuple[int, int] | None = None
    dtype: str = "BF16"

    @property
    def gated(self) -> bool:
        """False for experts that are up, activation, down with no gate."""
        return "gate" in self.names or "gate_up" in self.names

    @property
    def projections(self) -> tuple[Projection, ...]:
        return ("gate", "up", "down") if self.gated else ("up", "down")

    @property
    def label(self) -> str:
        """One word a person can read: `fused transposed interleaved, mxfp4`."""
        words = [self.kind.replace("_", " ")]
        words += ["transposed"] * self.transposed + ["interleaved"] * self.interleaved
        words += [] if self.gated else ["ungated"]
        return " ".join(words) + (f", {self.quantization}" if self.quantization else "")


@dataclass(frozen=True, slots=True)
class RouterLayout:
    """The router's tensors (below the layer prefix) and its arithmetic.

    Scores are `score_func` of the logits (of all experts, or of the chosen ones when
    `score_after_selection`). The top_k of scores plus `correction_bias` are chosen, inside the
    best `top_groups` of `num_groups` groups; `selection` names another method. Weights are the
    unbiased scores, renormalised if `normalize` (denominator + `normalize_epsilon`), times
    `scale`. None means not known. With `selection` other than `top_k`, training keeps transformers'
    own router (`transformers`) or puts Phi-MoE's kernel in it (`sparsemixer`).
    """

    weight: str | None
    score_func: str | None
    normalize: bool | None
    scale: float | None
    num_groups: int = 1
    top_groups: int = 1
    group_score: str | None = None
    correction_bias: str | None = None
    correction_bias_is_parameter: bool = False
    linear_bias: str | None = None
    score_after_selection: bool = False
    selection: str = "top_k"
    normalize_epsilon: float = 0.0
    scale_on: str = "weight"
    weight_on: str = "expert_output"
    float32: bool = False
    num_outputs: int | None = None

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """The parts of the routing rule that nobody stated."""
        values = {"score_func": self.score_func, "normalize": self.normalize, "scale": self.scale}
        return tuple(key for key, value in values.items() if value is None)


@dataclass(frozen=True, slots=True)
class SharedExperts:
    """Experts that every token passes: names as in ExpertStorage, the width of all together."""

    names: Mapping[str, str]
    num_experts: int
    intermediate_size: int
    gate: str | None = None
    block: str = ""


@dataclass(frozen=True, slots=True)
class MoELayout:
    """The routed experts of the decoder (or of the tower, when only that has experts).

    `activation_rule`, with act the config's `activation` and c the `activation_limit`:
    `standard` act(gate) * up; `ungated` act(up); `clamped_swiglu` silu(min(gate, c)) * clip(up, c);
    `swiglu_then_clamped` min(act(gate), c) * clip(up, c), c by layer or none; `gpt_oss_swiglu`
    with gate and up clamped likewise, (up + 1) * gate * sigmoid(1.702 * gate);
    `softcapped_swiglu` and `unknown` are not computed here.
    """

    layer_prefixes: Mapping[int, str]
    dense_layers: tuple[int, ...]
    num_experts: int
    top_k: int | None
    hidden_size: int
    expert_hidden_size: int
    expert_intermediate_size: int
    storage: ExpertStorage
    router: RouterLayout
    shared_experts: SharedExperts | None = None
    activation: str | None = None
    activation_rule: str = "standard"
    activation_limit: float | None = None
    num_experts_by_layer: Mapping[int, int] = field(default_factory=dict)
    mtp_layers: tuple[int, ...] = ()
    other_stacks: tuple[str, ...] = ()
    untrainable: str | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """MoE layer numbers, ascending."""
        return tuple(self.layer_prefixes)

    def experts_of_layer(self, layer: int) -> int:
        """Returns the number of routed experts of `layer`."""
        return self.num_experts_by_layer.get(layer, self.num_experts)

    def tensor_name(self, layer: int, name: str, expert: int | None = None) -> str:
        """Returns the checkpoint name of a name below the layer prefix."""
        text = name if expert is None else name.replace("{expert}", str(expert))
        prefix = self.layer_prefixes[layer]
        return f"{prefix}.{text}" if prefix else text

    def expert_tensor(self, layer: int, expert: int, projection: Projection) -> ExpertTensor:
        """Returns where `projection` of `expert` of `layer` lies.

        Raises LayoutError when the layer or the expert does not exist, or has no such projection.
        """
        if layer not in self.layer_prefixes or not 0 <= expert < self.experts_of_layer(layer):
            raise LayoutError(f"no expert {expert} in layer {layer}")
        if projection not in self.storage.projections:
            raise LayoutError(f"these experts have no {projection} projection")
        storage = self.storage
        fused = projection in ("gate", "up") and "gate_up" in storage.names
        name = storage.names["gate_up" if fused else projection]
        part: Part = "all"
        if fused and storage.interleaved:
            part = "even" if projection == "gate" else "odd"
        elif fused:
            part = "first_half" if projection == "gate" else "second_half"
        flat = storage.kind == "flat_rows"
        return ExpertTensor(
            name=self.tensor_name(layer, name, expert),
            index=None if storage.kind == "per_expert" else expert,
            rows=self.expert_intermediate_size if flat else None,
            part=part,
            part_dim=1 if storage.transposed else 0,
            # Flat rows store down as [I, H], the other two as nn.Linear does.
            transposed=projection == "down" if flat else storage.transposed,
        )

    def expert_bias(self, layer: int, expert: int, projection: Projection) -> ExpertTensor:
        """Returns where the bias of `projection` of `expert` of `layer` lies, a vector [out].

        Raises LayoutError when there is none.
        """
        weight = self.expert_tensor(layer, expert, projection)
        biases = self.storage.biases
        fused = projection in ("gate", "up") and "gate_up" in biases
        key = "gate_up" if fused else projection
        if key not in biases:
            raise LayoutError(f"these experts have no bias of the {projection} projection")
        return ExpertTensor(
            name=self.tensor_name(layer, biases[key], expert),
            index=weight.index,
            rows=None,
            part=weight.part if fused else "all",
            part_dim=0,
            transposed=False,
        )

    def router_tensors(self, layer: int) -> dict[str, str]:
        """Returns the router's checkpoint names: `weight`, `linear_bias`, `correction_bias`."""
        router = self.router
        names = {
            "weight": router.weight,
            "linear_bias": router.linear_bias,
            "correction_bias": router.correction_bias,
        }
        return {key: self.tensor_name(layer, name) for key, name in names.items() if name}

    def shared_tensors(self, layer: int) -> dict[str, str]:
        """Returns the shared experts' checkpoint names, empty when there are none."""
        if self.shared_experts is None:
            return {}
        names = dict(self.shared_experts.names)
        if self.shared_experts.gate:
            names["shared_gate"] = self.shared_experts.gate
        return {key: self.tensor_name(layer, name) for key, name in names.items()}


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Heads of one attention stack; `num_kv_heads` equals `num_heads` without grouping."""

    num_layers: int
    hidden_size: int | None
    num_heads: int | None
    num_kv_heads: int | None


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """Vision tower, projector and how images enter the token sequence.

    Sizes are in pixels (`patch_size`, `image_size`, `window_size`) or patches a side
    (`merge_size`: patches a side that become one token). `windowed_layers` attend inside windows
    only. `placeholder` says how many placeholder tokens stand for an image.
    """

    tower_prefix: str
    projector_prefix: str | None
    decoder_prefix: str | None
    attention: AttentionLayout
    patch_size: int | None
    temporal_patch_size: int | None
    merge_size: int | None
    image_size: int | None
    window_size: int | None
    windowed_layers: tuple[int, ...]
    image_token_id: int | None
    placeholder: str | None
    unit: str | None = None

    @property
    def cut_units(self) -> tuple[str, ...]:
        """Where sequence parallelism may cut the patches, coarse to fine; the first that balances.

        Empty for a plain encoder, and where the merge size is not known.
        """
        if self.merge_size is None:
            return ()
        units = [" or ".join(f"{word}s" for word in (self.unit or "image").split(" or "))]
        if self.window_size and self.patch_size and self.windowed_layers:
            side = self.window_size // self.patch_size
            units.append(f"windows of {side} x {side} patches")
        if self.temporal_patch_size is not None:  # packed rows; tiles stay whole
            units.append(f"blocks of {self.merge_size} x {self.merge_size} patches")
        return tuple(units)


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Logical parameters by part; packed formats count the values they stand for.

    `total` is routed + shared + dense + vision + embeddings. Not in it: `buffers` (correction
    biases that are no parameters), `scales` of quantised weights, `mtp` (multi-token-prediction
    layers, which the model itself does not run), `dropped` (stale tensors).
    """

    total: int
    active_per_token: int | None
    routed_experts: int
    shared_experts: int
    dense: int
    vision: int
    embeddings: int
    buffers: int = 0
    scales: int = 0
    mtp: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """The tensors of one name pattern and one shape; `part` is a field of ParameterCounts."""

    part: str
    shape: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SequenceParallelSize:
    """One sequence-parallel size: whether every attention head can be dealt out, or why not."""

    size: int
    legal: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What a checkpoint is. `family` is None when only the generic rule applied."""

    id: str
    source: str
    revision: str | None
    architecture: str | None
    model_type: str | None
    dtype: str
    family: str | None
    num_tensors: int
    num_bytes: int
    parameters: ParameterCounts
    moe: MoELayout | None
    vision: VisionLayout | None
    decoder: AttentionLayout | None
    ep_sizes: tuple[int, ...]
    sequence_parallel: tuple[SequenceParallelSize, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    reasons: Mapping[str, str]
    remote_code: bool = False
    parameter_shapes: tuple[ParameterShape, ...] = ()

    @property
    def sp_sizes(self) -> tuple[int, ...]:
        return tuple(entry.size for entry in self.sequence_parallel if entry.legal)

    def require_trainable(self) -> None:
        """Raises LayoutError unless every fact that training needs is known."""
        moe = self.moe
        if moe is None:
            return
        if moe.untrainable:
            raise LayoutError(f"`{self.id}` cannot be trained by epctl: {moe.untrainable}")
        missing = [f"moe.router.{key}" for key in moe.router.missing_keys]
        missing += ["moe.top_k"] * (moe.top_k is None)
        if missing:
            raise LayoutError(
                f"`{self.id}`: the expert layout is known, the routing rule of model_type "
                f"`{self.model_type}` is not: {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing",
                hint="state `scoring_func`, `norm_topk_prob`, `routed_scaling_factor` and "
                "`num_experts_per_tok` in the section of config.json that holds the decoder's "
                "sizes, or add a family file: docs/adding-a-model.md",
            )
