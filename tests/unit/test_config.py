"""RunConfig: strict keys, precedence, and where each value came from."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epctl.config import ResolvedConfig, config_keys, resolve_config
from epctl.errors import ConfigError


def test_flag_beats_set_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlr = 0.1\nmomentum = 0.5\n[train]\nsteps = 3\nseed = 4\n")
    resolved = resolve_config(
        file=file,
        settings=["optim.lr=0.2", "train.steps=5"],
        flags={"train.steps": 7, "train.seed": None},
    )
    config, sources = resolved.config, resolved.sources
    assert (config.optim.lr, sources["optim.lr"]) == (0.2, "--set")
    assert (config.train.steps, sources["train.steps"]) == (7, "flag")
    assert (config.optim.momentum, sources["optim.momentum"]) == (0.5, f"file {file}")
    assert (config.train.seed, sources["train.seed"]) == (4, f"file {file}")
    assert (config.optim.beta1, sources["optim.beta1"]) == (0.9, "default")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("optim.momentm=1", "unknown setting `optim.momentm` (--set)", "`optim.momentum`"),
        ("parallel.expert=1", "unknown setting `parallel.expert` (--set)", "parallel.ep"),
        ("zzz=1", "unknown setting `zzz` (--set)", "valid: "),
        ("optim.lr", "`--set optim.lr` has no `=`", "optim.lr=VALUE"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config(settings=[text], flags={})
    assert caught.value.message == message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[moe]\ncapacity = 1\n")
    with pytest.raises(ConfigError, match=r"unknown setting `moe\.capacity` \(file .*run\.toml\)"):
        resolve_config(file=file, flags={})


def test_broken_toml_says_where(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[optim\n")
    with pytest.raises(ConfigError, match=r"is not valid TOML.*line 1"):
        resolve_config(file=file, flags={})


@pytest.mark.parametrize(
    "text",
    [
        "optim.lr=0",
        "optim.beta2=1",
        "train.steps=0",
        "optim.schedule=step",
        "optim.lr=x",
        "optim.lr=inf",
        "train.steps=2.0",
        "optim.nesterov=off",
    ],
)
def test_values_out_of_range_are_refused_with_value_and_source(text: str) -> None:
    key, _, value = text.partition("=")
    with pytest.raises(ConfigError, match=rf"setting `{key}` = '?{value}'? \(--set\)"):
        resolve_config(settings=[text], flags={})


def test_json_round_trip_keeps_values_and_sources() -> None:
    resolved = resolve_config(settings=["optim.lr=0.5"], flags={"parallel.ep": 4})
    again = ResolvedConfig.from_json(resolved.to_json())
    assert again.config == resolved.config
    assert again.sources == resolved.sources


@given(st.sampled_from(sorted(config_keys())), st.text(min_size=1, max_size=12))
def test_no_setting_ever_escapes_as_an_untyped_error(key: str, value: str) -> None:
    with contextlib.suppress(ConfigError):
        resolve_config(settings=[f"{key}={value}"], flags={})


def test_a_section_is_not_a_setting_and_one_option_holds_one_setting() -> None:
    with pytest.raises(ConfigError, match="`optim` is a section, not a setting") as caught:
        resolve_config(settings=["optim=3"], flags={})
    assert caught.value.hint is not None
    assert "optim.lr, optim.adamw_lr" in caught.value.hint
    with pytest.raises(ConfigError, match="more than one setting"):
        resolve_config(settings=["train.steps=1\noptim.lr=2"], flags={})
    with pytest.raises(ConfigError, match=r"`parallel\.ep` = '4'"):
        resolve_config(settings=['parallel.ep="4"'], flags={})
