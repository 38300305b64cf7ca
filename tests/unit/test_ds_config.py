"""The DeepSpeed JSON over the whole space of settings, judged by DeepSpeed's own parsers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epctl.config import RunConfig, resolve_config
from epctl.errors import ConfigError
from epctl.launch.config_command import deepspeed_json, explain_keys, show_config
from epctl.launch.devices import Placement
from epctl.launch.ds_config import REASONS, deepspeed_config, flat_keys

POSITIVE = st.floats(1e-8, 10, allow_nan=False)
FLAGS = st.fixed_dictionaries(
    {
        "parallel.ep": st.sampled_from([1, 2, 4, 8]),
        "parallel.zero": st.sampled_from([0, 1, 2, 3]),
        "moe.implementation": st.sampled_from(["epctl", "autoep"]),
        "optim.name": st.sampled_from(["muon", "adamw", "deepspeed-muon"]),
        "optim.lr": POSITIVE,
        "optim.adamw_lr": st.none() | POSITIVE,
        "optim.weight_decay": st.floats(0, 1),
        "optim.momentum": st.floats(0, 0.99),
        "optim.per_head": st.booleans(),
        "optim.newton_schulz": st.sampled_from(["auto", "standard", "gram"]),
        "optim.offload": st.booleans(),
        "optim.gradient_clipping": st.floats(0, 100),
        "train.micro_batch_size": st.integers(1, 512),
        "train.gradient_accumulation_steps": st.integers(1, 512),
    }
)


def document_of(flags: dict[str, Any], bfloat16: bool, on_cpu: bool) -> dict[str, Any] | None:
    """The JSON, or None for what epctl must refuse: offload at ZeRO-0."""
    config = resolve_config(flags=flags).config
    if flags["optim.offload"] and flags["parallel.zero"] == 0:
        with pytest.raises(ConfigError, match="offload needs ZeRO"):
            deepspeed_config(config, bfloat16=bfloat16, on_cpu=on_cpu)
        return None
    return deepspeed_config(config, bfloat16=bfloat16, on_cpu=on_cpu)


def rejection(document: dict[str, Any]) -> str | None:
    """What DeepSpeed's own config classes say against the document; None if nothing."""
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(json.loads(json.dumps(document)))
        parse_autoep_config(document.get("expert_parallel", {}))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


class Recorder(dict[str, Any]):
    """A dict that notes which of its keys were asked for."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__(document)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __deepcopy__(self, memo: Any) -> Recorder:
        return self


def unread_keys(document: dict[str, Any]) -> set[str]:
    """Top-level keys that DeepSpeed's parsers never look at: there it forgives a misspelling."""
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = Recorder(document)
    DeepSpeedConfig(recorder)
    return set(document) - recorder.read


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(flags=FLAGS, bfloat16=st.booleans(), on_cpu=st.booleans())
def test_deepspeed_accepts_every_document(
    flags: dict[str, Any], bfloat16: bool, on_cpu: bool
) -> None:
    document = document_of(flags, bfloat16, on_cpu)
    if document is None:
        return
    assert rejection(document) is None
    # The engine reads these two itself, without its config class.
    assert unread_keys(document) <= {"zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"}
    missing = {key for key, _ in flat_keys(document)} - set(REASONS)
    assert not missing, f"no reason given for {missing}"


@pytest.mark.parametrize(
    "fault", ["zero_optimization.stagee", "bf16.enable", "zero_optimization.stage"]
)
def test_the_judge_rejects_a_wrong_document(fault: str) -> None:
    """The property above means something: DeepSpeed's models do refuse what is wrong."""
    document = deepspeed_config(RunConfig(), bfloat16=True, on_cpu=True)
    section, _, key = fault.partition(".")
    document[section][key] = 9
    assert rejection(document) is not None


def test_the_judge_sees_an_unread_key() -> None:
    document = deepspeed_config(RunConfig(), bfloat16=True, on_cpu=True)
    assert unread_keys(document | {"gradient_cliping": 1.0}) >= {"gradient_cliping"}


def test_every_reason_belongs_to_a_key_that_can_be_written() -> None:
    written: set[str] = set()
    for zero in (0, 1, 2, 3):
        for flags in (
            {"optim.name": "deepspeed-muon", "moe.implementation": "autoep"},
            {"optim.offload": zero > 0},
            {"train.activation_checkpointing": "full"},
        ):
            config = resolve_config(flags={"parallel.zero": zero, **flags}).config
            document = deepspeed_config(config, bfloat16=True, on_cpu=True)
            written |= {key for key, _ in flat_keys(document)}
    assert written == set(REASONS)


def test_explanation_names_setting_and_source() -> None:
    resolved = resolve_config(flags={"parallel.zero": 2}, settings=["optim.gradient_clipping=0.5"])
    document = deepspeed_json(resolved, Placement("cpu", 1, ""))
    rows = {row.key: row for row in explain_keys(document, resolved)}
    assert rows["zero_optimization.stage"].source == "flag"
    assert rows["gradient_clipping"].value == 0.5
    assert rows["gradient_clipping"].source == "--set"
    assert rows["zero_optimization.overlap_comm"].setting is None


def test_a_value_that_is_not_the_setting_shows_both() -> None:
    resolved = resolve_config(flags={"parallel.zero": 0})
    document = deepspeed_json(resolved, Placement("cpu", 1, ""))
    rows = {row.key: row for row in explain_keys(document, resolved)}
    assert rows["gradient_clipping"].value == 0.0
    assert "(setting: 1.0)" in rows["gradient_clipping"].reason


def test_command_writes_plain_json_or_the_reasons(sink: Any) -> None:
    output, stdout, _ = sink
    resolved = resolve_config(flags={"parallel.device": "cpu", "parallel.ep": 2})
    show_config(resolved, output, explain=False)
    document = json.loads(stdout.getvalue())
    assert document["zero_optimization"]["stage"] == 3
    show_config(resolved, output, explain=True)
    text = stdout.getvalue()
    assert "zero_optimization.stage = 3\n    what is partitioned" in text
    assert "[parallel.zero: default]" in text


def test_command_refuses_an_ep_that_does_not_fit(sink: Any) -> None:
    output, _, _ = sink
    resolved = resolve_config(
        flags={"parallel.device": "cpu", "parallel.ep": 4, "parallel.num_ranks": 6}
    )
    with pytest.raises(ConfigError, match="4 does not divide the 6 ranks"):
        show_config(resolved, output, explain=False)
