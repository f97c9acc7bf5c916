"""Budgets, schedules and what contradicts itself."""

import pytest

from model.errors import ModelError
from model.training.config import LengthPhase, Schedule
from tests.model.training.toy import SIXTEEN, toy_config, toy_stage


def test_the_learning_rate_warms_up_holds_and_falls():
    schedule = Schedule(peak=2.0, warm_steps=4, hold=0.5, end=0.1)
    assert [schedule.at(step, 0.0) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert schedule.at(99, 0.5) == 2.0
    assert schedule.at(99, 0.75) == pytest.approx(1.1)
    assert schedule.at(99, 1.0) == pytest.approx(0.2)


def test_tokens_are_rounded_up_to_steps():
    assert toy_stage(steps=None, tokens=1000).num_steps(128) == 8


@pytest.mark.parametrize("share, dense", [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_dense_steps_are_a_share_of_the_sparse_stage(share, dense):
    stage = toy_stage("sparse", dense_share=share)
    assert sum(stage.is_dense_step(step) for step in range(20)) == dense


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": None}, "expected steps, tokens or seconds"),
        ({"tokens": 100}, "steps and tokens contradict"),
        ({"main": None}, r"stages\.dense\.main: expected a learning rate"),
        ({"indexer": Schedule(peak=1.0)}, r"stages\.dense\.indexer: expected none"),
        ({"lengths": (LengthPhase(start=0.5, shares=((16, 1.0),)),)}, "expected phases from 0 on"),
        (
            {"steps": None, "seconds": 3.0, "lengths": (*SIXTEEN, LengthPhase(start=0.5, shares=((32, 1.0),)))},
            "lengths that change need steps or tokens",
        ),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        toy_stage(**changes)


def test_a_batch_is_a_multiple_of_every_length():
    with pytest.raises(ModelError, match="batch_tokens 100 is no multiple of 16"):
        toy_config(toy_stage(), batch_tokens=100)


def test_stages_have_different_names():
    with pytest.raises(ModelError, match="every name once"):
        toy_config(toy_stage(), toy_stage())
