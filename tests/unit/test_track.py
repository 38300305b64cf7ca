"""What of an event goes to an experiment tracker: its numbers, by stable names."""

from __future__ import annotations

from epctl.launch.track import tracked_values


def test_a_step_gives_its_numbers_and_leaves_out_names() -> None:
    event = {
        "event": "step",
        "time": 1.0,
        "step": 7,
        "loss": 2.5,
        "tokens": 10,
        "attention_logit_layer": "model.layers.3.self_attn",
    }
    assert tracked_values(event) == {"train/loss": 2.5, "train/tokens": 10.0}


def test_an_evaluation_gives_its_loss_and_other_events_nothing() -> None:
    assert tracked_values({"event": "eval", "loss": 1.5, "step": 3}) == {"eval/loss": 1.5}
    assert tracked_values({"event": "plan", "num_ranks": 4}) == {}
