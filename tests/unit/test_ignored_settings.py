"""Every setting without effect is told, and none that has one."""

from __future__ import annotations

import pytest

from epctl.config import config_keys, resolve_config
from epctl.launch.ignored import ignored_settings


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        (["optim.name=deepspeed-muon"], {"optim.nesterov", "optim.qk_clip", "optim.coefficients"}),
        (["optim.name=adamw"], {"optim.nesterov", "optim.per_head", "optim.newton_schulz"}),
        (["optim.qk_clip=100"], {"optim.attention_logit_interval"}),
        (["optim.schedule=linear"], {"optim.decay_ratio"}),
        (["data.train=local.txt"], {"data.split", "data.streaming", "data.shuffle_window"}),
        (["data.train=org/data", "data.shuffle=false"], {"data.shuffle_window"}),
    ],
)
def test_settings_without_effect(settings: list[str], ignored: set[str]) -> None:
    told = {key for key, _ in ignored_settings(resolve_config(settings=settings, flags={}))}
    assert ignored <= told
    assert "optim.lr" not in told


def test_the_default_muon_run_uses_every_optimizer_setting_but_one() -> None:
    told = {key for key, _ in ignored_settings(resolve_config(flags={}))}
    assert {key for key in told if key.startswith("optim.")} == {"optim.decay_ratio"}


def test_a_hub_dataset_uses_its_settings() -> None:
    told = {k for k, _ in ignored_settings(resolve_config(settings=["data.train=org/d"], flags={}))}
    assert not {key for key in told if key.startswith("data.")}


def test_only_real_settings_are_named() -> None:
    for name in ("muon", "adamw", "deepspeed-muon"):
        resolved = resolve_config(settings=[f"optim.name={name}", "optim.qk_clip=1"], flags={})
        assert {key for key, _ in ignored_settings(resolved)} <= set(config_keys())
