"""tools/train_scale_shift.py: training helps, gives the same twice, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import train_scale_shift as tool
from diffusers import StableDiffusionPipeline

from fastcache import CachePlan
from fastcache.demo import MODEL_DIRECTORY
from fastcache.loop.adjustment import ScaleShift

PLAN = CachePlan(("full", "blocks-" + "10" * 8, "blocks-" + "0" * 16), sampler="ddim", made_by="blocks(threshold=1)")
PROMPTS = ["a large red circle", "a small blue ring"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, safety_checker=None)


def loss(pipe: Any, plan: CachePlan) -> float:
    """How far a plan's own scales and shifts leave blocks from the teacher's, in one run."""
    found = list[float]()
    tool.train(
        pipe, plan, PROMPTS, tool.Training(rounds=1, batch=2, learning_rate=0.0), lambda _, one: found.append(one)
    )
    return found[0]


def test_training_helps_is_repeatable_and_leaves_what_runs_alone(pipe: Any) -> None:
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    how = tool.Training(rounds=6, batch=2)
    trained = tool.train(pipe, PLAN, PROMPTS, how)
    assert trained == tool.train(pipe, PLAN, PROMPTS, how)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert loss(pipe, trained) < loss(pipe, PLAN)
    assert trained.scale_shift is not None
    table = trained.scale_shift.table
    assert np.array_equal(table[0], [np.ones(table.shape[2]), np.zeros(table.shape[2])])  # all of step 0 runs


def test_it_begins_at_what_the_plan_has(pipe: Any) -> None:
    table = np.random.default_rng(0).normal(1, 0.1, (3, 2, 1536)).astype(np.float32)
    given = replace(PLAN, scale_shift=ScaleShift.of(table))
    kept = tool.train(pipe, given, PROMPTS, tool.Training(rounds=1, batch=1, learning_rate=0.0)).scale_shift
    assert kept is not None
    np.testing.assert_allclose(kept.table[2], table[2], atol=1e-5)  # the step that reuses every block


@pytest.mark.parametrize("plan", [CachePlan.uniform(4, 2), CachePlan(("full", "blocks-" + "0" * 16))])
def test_other_plans_are_refused(pipe: Any, plan: CachePlan) -> None:
    with pytest.raises(ValueError, match="expected a plan of full passes and patterns of blocks"):
        tool.train(pipe, plan, PROMPTS, tool.Training(rounds=1))
