"""Rows of runs that foretell the noise where the network is not called, against a loop that does so step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastcache.loop.fit import Fit
from fastcache.loop.fitted import Grid, default_rows, fitted_table
from fastcache.planning.skipping import FORETOLD, skipping_rows
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "steps_offset": 1}
POINTS = (0, 1, 3, 6, 7, 11)


def network(call: int, x: Tensor) -> Tensor:
    return (x + 0.05 * call).tanh()


def table_of(sampler: str, prediction_type: str) -> SamplerTable:
    return compile_sampler(make_scheduler(sampler, CONFIG | {"prediction_type": prediction_type}), 14)


def step_by_step(table: SamplerTable, prediction_type: str, how: str, x: Tensor) -> Tensor:
    """All steps of the sampler; the noise of those without a call is foretold from the last four calls."""
    grid = Grid.of(table, prediction_type)
    states, predictions, heard = [x], list[Tensor](), dict[int, Tensor]()
    for call, update in enumerate(table.recursion()):
        of_x, of_e = grid.eps_weights(call)
        if call in POINTS:
            predictions.append(network(call, states[call]))
            heard[call] = of_x * states[call] + of_e * predictions[call]
        else:
            last = list(heard)[-4:]
            shares = FORETOLD[how](last, call)
            noise = sum((share * heard[k] for share, k in zip(shares, last, strict=True)), torch.zeros_like(x))
            predictions.append((noise - of_x * states[call]) / of_e)
        terms = zip(range(update.first, call + 1), update.weights[::3], update.weights[1::3], strict=True)
        states.append(sum((a * states[k] + b * predictions[k] for k, a, b in terms), torch.zeros_like(x)))
    return states[-1]


@pytest.mark.parametrize("how", FORETOLD)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm++_2m", "euler"])
def test_a_row_is_all_steps_to_the_next_call(sampler: str, prediction_type: str, how: str) -> None:
    table = table_of(sampler, prediction_type)
    rows = skipping_rows(table, prediction_type, POINTS, FORETOLD[how])
    run = fitted_table(table, Fit(14, POINTS, tuple(rows), 1.0, 8, 8, "0" * 64, "onnxruntime", "fp32", 0))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * table.init_noise_sigma
    states, predictions = [x], list[Tensor]()
    for step, update in enumerate(run.recursion()):
        predictions.append(network(POINTS[step], states[step]))
        terms = zip(range(update.first, step + 1), update.weights[::3], update.weights[1::3], strict=True)
        states.append(sum((a * states[k] + b * predictions[k] for k, a, b in terms), torch.zeros_like(x)))
    torch.testing.assert_close(states[-1], step_by_step(table, prediction_type, how, x), rtol=1e-9, atol=1e-9)


def test_a_run_that_calls_at_every_step_is_the_samplers_own() -> None:
    table = table_of("dpm++_2m", "epsilon")
    rows = skipping_rows(table, "epsilon", range(14), FORETOLD["line"])
    for row, own in zip(rows, default_rows(table, "epsilon", range(14)), strict=True):
        window = len(own)
        assert row[-window:] == pytest.approx(own)
        assert row[:-window] == pytest.approx([0.0] * (len(row) - window))


@pytest.mark.parametrize("how", FORETOLD)
@given(places=st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True).map(sorted), ahead=st.integers(1, 9))
def test_what_stays_as_it_is_is_foretold(how: str, places: list[int], ahead: int) -> None:
    shares = FORETOLD[how](places, places[-1] + ahead)
    assert len(shares) == len(places)
    assert sum(shares) == pytest.approx(1)
