"""Plans that begin alike share what was foretold there: the same numbers, by fewer calls."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcache import Bundle
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.beginnings import Beginnings
from fastcache.planning.climb import Stops
from fastcache.planning.fit import Predict, fit_rows
from fastcache.planning.walks import Walks
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import compile_sampler

PROMPTS = ["a red circle", "a blue ring", "a green square"]


class Counted(Walks):
    calls = 0

    def guided(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        return super().guided(*args, **kwargs)  # pyright: ignore[reportArgumentType]


BASE: Stops = ((0, "full"), (2, "shallow-0"), (4, "full"), (6, "shallow-0"), (9, "shallow-0"))
CHANGED: tuple[Stops, ...] = (
    BASE,
    (*BASE[:4], (10, "shallow-0")),  # a shallow step behind a full one that is not run again
    (*BASE[:3], (7, "full"), (9, "shallow-0")),
    (*BASE[:2], (5, "shallow-0"), (6, "full"), (9, "shallow-0")),
    (*BASE[:1], (3, "full"), (4, "full")),
    (*BASE[:4], (9, "full")),
)


def test_a_changed_plan_walks_as_if_it_were_alone(tiny_bundle: Bundle) -> None:
    pipe = FastCachePipeline(tiny_bundle)
    table = compile_sampler(make_scheduler("ddim", pipe.bundle.manifest.model.scheduler), 12)
    walks = Counted(pipe, PROMPTS, range(3), table=table, guidance_scale=4.0)
    states, beginnings = walks.reference(), Beginnings(walks)

    def ended(stops: Stops, predict: Predict) -> tuple[Tensor, int]:
        before = walks.calls
        fitted = fit_rows(predict, states, table, "epsilon", [point for point, _ in stops])
        return fitted.result, walks.calls - before

    calls = list[int]()
    for stops in CHANGED:
        wanted, _ = ended(stops, lambda step, x, own=stops: walks.guided(own[step][1], own[step][0], x))
        found, taken = ended(stops, beginnings.walk(stops))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        calls.append(taken)
    # The second and the fourth go through the steps since the last full one again, for the feature that it stored.
    assert calls == [5, 3, 2, 5, 2, 1]
    assert ended(BASE, beginnings.walk(BASE))[1] == 0
