"""Published configurations -> the multiply-adds of a U-Net call under uniform plans, beside the DeepCache paper's.

Prints a Markdown table. Counted as the paper counts: convolutions and linear layers, averaged over the steps, without
guidance. Its counter (`flops.py` of horseee/DeepCache) hooks modules, so it misses attention's own two products and
adds biases and norms, about 0.1%.

Example: python tools/macs.py
"""

from __future__ import annotations

from dataclasses import dataclass

import typer

from fastcache.bench.work import unet_work
from fastcache.compile.models import find_model
from fastcache.cut.work import uniform_cost

INTERVALS = (1, 2, 3, 5, 10, 20)
TOLERANCE = 0.02


@dataclass(frozen=True)
class Published:
    """What arXiv 2312.00858 says of one model: `macs` are G for each interval N, `branch_id` in helper's counting.

    The paper counts skip branches from 1: "3/1/2 for DDPMs, LDM-4-G and Stable Diffusion" (section 4.2).
    """

    preset: str
    title: str
    branch_id: int
    steps: int
    macs: dict[int, float]


@dataclass(frozen=True)
class MultiplyAdds:
    """What one image costs in one U-Net call, in full and above the cut, without guidance."""

    full: int
    shallow: int

    def average(self, num_calls: int, interval: int) -> float:
        """What a call costs on average under a uniform plan."""
        return uniform_cost(self.full, self.shallow, num_calls, interval)


PAPER = (
    Published("sd15", "SD1.5, 512x512, PLMS", 1, 50, {1: 338.83, 5: 130.45}),  # Table 3
    Published("ldm4g", "LDM-4-G, 256x256, DDIM", 0, 250, {1: 99.82, 2: 52.12, 3: 36.48, 5: 23.50, 10: 13.97, 20: 9.39}),
    Published("ddpm256", "DDPM LSUN 256x256, DDIM", 2, 100, {1: 248.7, 2: 190.8, 3: 172.3, 5: 156.0}),  # Table 2
)


def table() -> list[str]:
    """The rows of the table, one a model and interval."""
    rows = ["| model | branch | steps | N | G, ours | G, paper | difference |", "|---|---|---|---|---|---|---|"]
    for model in PAPER:
        work = counted(model)
        for interval in INTERVALS:
            ours, theirs = work.average(model.steps, interval) / 1e9, model.macs.get(interval)
            beside = "- | -" if theirs is None else f"{theirs:.2f} | {_difference(ours, theirs)}"
            rows.append(f"| {model.title} | {model.branch_id} | {model.steps} | {interval} | {ours:.2f} | {beside} |")
    return rows


def counted(model: Published) -> MultiplyAdds:
    """The model's full and shallow pass as the paper counts."""
    work = unet_work(find_model(model.preset, random_weights=True))
    return MultiplyAdds(work.full.layers, work.shallow[model.branch_id].layers)


def _difference(ours: float, theirs: float) -> str:
    share = ours / theirs - 1
    return f"{100 * share:+.2f}%" + (" (see below)" if abs(share) > TOLERANCE else "")


def explanation() -> str:
    """Why the one figure differs: how many of the 50 steps must be full to give it."""
    paper = PAPER[0]
    work, theirs = counted(paper), paper.macs[5] * 1e9
    refreshes = paper.steps * (theirs - work.shallow) / (work.full - work.shallow)
    at_four = work.average(paper.steps, 4) / 1e9
    return (
        f"SD1.5 at N=5: the paper's {paper.macs[5]} G is {refreshes:.2f} full steps of {paper.steps} at its branch "
        f"(skip branch 2 is id 1). N=5 has 10; N=4 has 13, and gives {at_four:.2f} G "
        f"({_difference(at_four, paper.macs[5])}). "
        "So it is most likely N=4's, for neither the counter nor the branch explains it."
    )


def main() -> None:
    """Print the table and what is to be said of it.

    Example: python tools/macs.py
    """
    typer.echo("\n".join([*table(), "", explanation()]))


if __name__ == "__main__":
    typer.run(main)
