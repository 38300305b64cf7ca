"""RunConfig: every setting of a run, strict, with the source of each value.

Precedence: flag > `--set` > `--config` file > default. An unknown key anywhere is an error that
names the nearest valid one. The field descriptions feed `docs/config.md` and error texts.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from epctl.config_checkpoint import CheckpointSection, GuardsSection, Section
from epctl.config_data import DataSection, ModelSection
from epctl.errors import ConfigError

# What backward makes again; the order is of what is kept, the most first.
Recompute = Literal["none", "attention", "moe", "except_attention", "full"]
WHOLE_LAYERS: tuple[Recompute, ...] = ("except_attention", "full")
# A yes or no is what other trainers have here: all of a layer, or nothing.
Checkpointing = Annotated[
    Recompute,
    BeforeValidator(lambda value: _mode(value) if isinstance(value, bool) else value),
]


def _mode(recompute: bool) -> str:
    return "full" if recompute else "none"


class ParallelSection(Section):
    ep: int = Field(1, ge=1, description="expert parallel size")
    sp: int = Field(1, ge=1, description="sequence parallel size: ranks that share each sample")
    share_images: bool = Field(
        False,
        description="all ranks encode all their samples' images (packed patches) in even shares",
    )
    zero: Literal[0, 1, 2, 3] = Field(3, description="ZeRO stage")
    num_ranks: int | None = Field(
        None, ge=1, description="ranks to start; default: every GPU, or what `ep` and `sp` need"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where ranks run")
    timeout_minutes: float = Field(30.0, gt=0, description="collective timeout")


class MoESection(Section):
    implementation: Literal["epctl", "autoep"] = Field(
        "epctl", description="epctl's layer, or DeepSpeed's own for comparison"
    )
    bias_update_rate: float = Field(
        0.0, ge=0, description="step of the correction biases towards even loads (DeepSeek: 0.001)"
    )
    sequence_loss: float = Field(
        0.0, ge=0, description="factor of the sequence-wise balance loss (DeepSeek: 0.0001)"
    )
    z_loss: float = Field(0.0, ge=0, description="factor of the loss on large router logits")
    capacity_factor: float | None = Field(
        None, gt=0, description="choices an expert takes, over its even share; default: all"
    )
    recompute: Literal["none", "activation"] = Field(
        "none", description="what experts compute again in backward: nothing, or gate and up"
    )
    max_tokens_per_rank: int | None = Field(
        None, ge=1, description="rows a rank's experts take in one exchange; more is an error"
    )


class OptimSection(Section):
    name: Literal["muon", "adamw", "deepspeed-muon"] = Field(
        "muon", description="optimizer of the matrices; deepspeed-muon: the engine's, to compare"
    )
    lr: float = Field(5e-3, gt=0, description="learning rate of the matrices (Muon)")
    adamw_lr: float | None = Field(
        None, gt=0, description="learning rate of everything on AdamW; default: `lr`"
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled, times the unscaled rate")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon momentum")
    nesterov: bool = Field(True, description="Nesterov momentum for Muon")
    update_scale: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw", description="0.2*sqrt(max(rows, columns)), or sqrt(max(1, rows/columns))"
    )
    momentum_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype the Muon momentum is kept in"
    )
    per_head: bool = Field(False, description="orthogonalise each attention head's rows apart")
    newton_schulz: Literal["auto", "standard", "gram"] = Field(
        "auto", description="iteration; auto: the cheaper one for each shape"
    )
    coefficients: Literal["jordan", "you", "polar_express_1.05", "polar_express_1.02"] = Field(
        "you", description="Newton-Schulz polynomial; Polar Express by its safety factor"
    )
    newton_schulz_steps: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations")
    kernels: Literal["auto", "torch", "triton"] = Field(
        "auto", description="Muon's on a GPU; auto: Triton where it was measured to be faster"
    )
    qk_clip: float | None = Field(
        None, gt=0, description="bound on attention logits, by scaling query and key rows"
    )
    attention_logit_interval: int = Field(
        0, ge=0, description="steps between measurements of the largest attention logit; 0 is off"
    )
    router: Literal["muon", "adamw"] = Field("muon", description="optimizer of router weights")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW")
    eps: float = Field(1e-8, gt=0, description="AdamW")
    offload: bool = Field(False, description="masters and optimizer state in host memory")
    gradient_clipping: float = Field(
        1.0, ge=0, description="bound on the norm of the raw gradient; 0 is off"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="learning-rate schedule after warm-up"
    )
    warmup_steps: int = Field(10, ge=0, description="linear warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last rate over first")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="share of steps that wsd decays over")


class TrainSection(Section):
    parameters: str = Field(
        "all", description="what is trained: all, experts, attention, router, or a regex of names"
    )
    steps: int = Field(
        100, ge=1, description="optimizer steps; with data and no budget given: one epoch"
    )
    tokens: int | None = Field(None, ge=1, description="length of the run in tokens")
    epochs: float | None = Field(
        None, gt=0, description="length of the run in passes over the data"
    )
    micro_batch_size: int = Field(4, ge=1, description="sequences a rank and micro-step")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-steps a step")
    sequence_length: int = Field(256, ge=8, description="tokens a sequence")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on GPU, float32 on CPU"
    )
    activation_checkpointing: Checkpointing = Field(
        "none",
        description="what backward recomputes: none, attention, moe, full layers, or of them all "
        "but what attention gave (except_attention)",
    )
    logits_mib: float = Field(
        512, gt=0, description="float32 logits held at one time, MiB; more are made in blocks"
    )
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: before and after")
    eval_batches: int = Field(8, ge=1, description="held-out micro-batches a rank")
    report_every: int = Field(5, ge=1, description="steps between reports")
    sample_tokens: int = Field(64, ge=0, description="tokens sampled before and after; 0 is off")
    seed: int = Field(0, ge=0, description="weights, data order and sampling")

    def uses_bfloat16(self, device: str) -> bool:
        """True when weights and activations are bfloat16; `auto` means so on GPUs ("cuda")."""
        return self.precision == "bfloat16" or (self.precision == "auto" and device == "cuda")


class RunSection(Section):
    output: str | None = Field(None, description="run folder; default: runs/<date>-<time>")
    resume: str | None = Field(None, description="run folder whose newest checkpoint goes on")
    save: bool = Field(True, description="write a Hugging Face folder at the end")
    profile: bool = Field(
        False, description="trace three steps of rank 0 and say where their time went"
    )
    track: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="experiment tracker beside metrics.jsonl"
    )


class CheckSection(Section):
    num_layers: int | None = Field(
        None, ge=1, description="decoder layers that `--check` keeps; default: all"
    )
    steps: int = Field(2, ge=1, description="optimizer steps that `--check` compares")


class LaunchSection(Section):
    launcher: Literal["torchrun", "deepspeed", "slurm"] = Field(
        "torchrun", description="what starts the ranks; slurm: an sbatch script around epctl"
    )
    num_nodes: int = Field(1, ge=1, description="machines of the job; ranks are shared out evenly")
    node_rank: int = Field(0, ge=0, description="which of them this is; 0 writes the run folder")
    rendezvous: str | None = Field(None, description="HOST:PORT of node 0 where the nodes meet")
    local_address: str | None = Field(
        None, description="address the others reach this node by; default: its host name"
    )
    hostfile: str | None = Field(None, description="file of `HOST slots=N` lines, started by ssh")
    max_restarts: int = Field(
        0, ge=0, description="times the ranks are started again from the newest checkpoint"
    )
    slurm_partition: str | None = Field(None, description="sbatch --partition")
    slurm_account: str | None = Field(None, description="sbatch --account")
    slurm_time: str = Field("24:00:00", description="sbatch --time")
    slurm_signal_seconds: int = Field(
        120, ge=0, description="seconds before the limit at which the ranks are told to end"
    )


class RunConfig(Section):
    """All settings of `epctl train`."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    parallel: ParallelSection = ParallelSection()
    moe: MoESection = MoESection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guards: GuardsSection = GuardsSection()
    check: CheckSection = CheckSection()
    launch: LaunchSection = LaunchSection()


# What the small embedded model trains well with would ruin or starve a published one.
MODEL_DEFAULTS: Mapping[str, Any] = {
    "optim.lr": 2e-5,
    "train.sequence_length": 4096,
    "train.micro_batch_size": 1,
    "train.activation_checkpointing": "full",
}
MODEL_DEFAULT_SOURCE = "default with MODEL"
# How long a run is: one of these, the last one given.
LENGTH_KEYS = ("train.steps", "train.tokens", "train.epochs")


@dataclass(frozen=True)
class ResolvedConfig:
    """A RunConfig and where each of its values came from (`default`, a file, `--set`, a flag)."""

    config: RunConfig
    sources: Mapping[str, str]

    def is_given(self, key: str) -> bool:
        """True for a value that somebody chose, false for a default."""
        return not self.sources[key].startswith("default")

    def replaced(self, key: str, value: Any) -> ResolvedConfig:
        """Returns a copy with one value changed, its source kept."""
        section, _, name = key.partition(".")
        changed = getattr(self.config, section).model_copy(update={name: value})
        return ResolvedConfig(self.config.model_copy(update={section: changed}), self.sources)

    def given(self) -> dict[str, Any]:
        """Returns the chosen values by dotted key."""
        return {key: value for key, value in flat_values(self.config).items() if self.is_given(key)}

    def to_json(self) -> str:
        document = {"config": self.config.model_dump(), "sources": dict(self.sources)}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ResolvedConfig:
        document = json.loads(text)
        return cls(RunConfig.model_validate(document["config"]), document["sources"])


def config_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of the config, `parallel.ep` and so on."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from config_keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def flat_values(config: RunConfig) -> dict[str, Any]:
    """Returns every value by its dotted key."""
    sections = config.model_dump()
    return {f"{s}.{name}": v for s, values in sections.items() for name, v in values.items()}


def resolve_config(
    *,
    file: Path | None = None,
    settings: list[str] | None = None,
    flags: Mapping[str, Any],
    base: tuple[Mapping[str, Any], str] | None = None,
) -> ResolvedConfig:
    """Merges defaults, a TOML file, `--set key=value` and flags (None means not given).

    Args:
        base: values under all of these and where they are from: a run that is resumed.

    Raises ConfigError for an unreadable file, an unknown key or a value out of range.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(config_keys(), "default")
    layers = [base] if base is not None else []
    layers += [(_read_file(file), f"file {file}")] if file is not None else []
    layers.append((dict(_parse_setting(text) for text in settings or []), "--set"))
    layers.append(({key: value for key, value in flags.items() if value is not None}, "flag"))
    for layer, source in layers:
        _drop_other_lengths(values, sources, layer, source)
        for key, value in layer.items():
            _check_key(key, source)
            values[key] = value
            sources[key] = source
    _add_dependent_defaults(values, sources)
    return ResolvedConfig(_validate(values, sources), sources)


def _drop_other_lengths(
    values: dict[str, Any], sources: dict[str, str], layer: Mapping[str, Any], source: str
) -> None:
    """A length in a layer replaces those of the layers below; two in one layer contradict."""
    stated = [key for key in LENGTH_KEYS if key in layer]
    if len(stated) > 1:
        raise ConfigError(
            f"{' and '.join(f'`{key}`' for key in stated)} are both given ({source})",
            hint="give one of steps, tokens and epochs",
        )
    for key in LENGTH_KEYS if stated else ():
        values.pop(key, None)
        sources[key] = "default"


def _add_dependent_defaults(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Fills in the defaults that depend on whether a model or data is given."""
    has_model = values.get("model.reference") is not None
    defaults = dict(MODEL_DEFAULTS) if has_model else {}
    if (has_model or values.get("data.train")) and not any(key in values for key in LENGTH_KEYS):
        defaults["train.epochs"] = 1.0
    for key, value in defaults.items():
        if sources[key] == "default":
            values[key], sources[key] = value, MODEL_DEFAULT_SOURCE


def _read_file(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file `{path}`: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file `{path}` is not valid TOML: {error}") from None
    return dict(_flatten(document))


def _flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parse_setting(text: str) -> tuple[str, Any]:
    key, separator, raw = text.partition("=")
    if not separator:
        raise ConfigError(f"`--set {text}` has no `=`", hint=f"write `--set {text}=VALUE`")
    try:
        document = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return key.strip(), raw.strip()  # an unquoted string
    if len(document) > 1:
        raise ConfigError(
            f"`--set {text!r}` holds more than one setting", hint="give each its own `--set`"
        )
    return key.strip(), document["value"]


def _check_key(key: str, source: str) -> None:
    known = list(config_keys())
    if key in known:
        return
    if any(name.startswith(f"{key}.") for name in known):
        names = ", ".join(name for name in known if name.startswith(f"{key}."))
        raise ConfigError(
            f"`{key}` is a section, not a setting ({source})", hint=f"its settings: {names}"
        )
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    section = key.partition(".")[0]
    siblings = [name for name in known if name.startswith(section + ".")] or known
    did_you_mean = f"did you mean `{nearest[0]}`? " if nearest else ""
    raise ConfigError(
        f"unknown setting `{key}` ({source})", hint=f"{did_you_mean}valid: {', '.join(siblings)}"
    )


def _validate(values: Mapping[str, Any], sources: Mapping[str, str]) -> RunConfig:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    try:
        return RunConfig.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        source = sources.get(key, "?")
        raise ConfigError(
            f"setting `{key}` = {first['input']!r} ({source}): {first['msg'].lower()}"
        ) from None
