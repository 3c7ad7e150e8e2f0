"""Train the scale and shift of a plan of blocks: python tools/train_scale_shift.py --help

From the timestep's embedding a linear layer gives a scale and a shift for every channel of every block; all else is
frozen. A student runs with caching, from noise on. Its teacher is the same network without caching, asked at the
student's states. What every block hands on is matched at every step that reuses, one step after another.
Source: Block Caching, arXiv 2312.03209, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from fastcache import CachePlan, partition_blocks
from fastcache.cut.chain import neutral
from fastcache.cut.names import FULL, is_pattern, pattern_of
from fastcache.cut.pieces import BlockUNet, Trunk
from fastcache.demo import MODEL_DIRECTORY
from fastcache.evaluate.judges import calibration_prompts
from fastcache.files import write_whole
from fastcache.loop.adjustment import ScaleShift
from fastcache.planning.trajectory import draw_noise
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler


@dataclass(frozen=True)
class Training:
    """How long and on what: `rounds` runs of `batch` pictures each, no prompt and no seed twice."""

    rounds: int = 60
    batch: int = 8
    learning_rate: float = 5e-4
    guidance_scale: float = 4.0


class ScaleShiftLayer(nn.Module):
    """The timestep's embedding -> scales and shifts, (2, channels); at first those of `start`, (steps, 2, channels)."""

    def __init__(self, embeddings: Tensor, start: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(embeddings.shape[1], start[0].numel())
        own = (start - neutral(1, start.shape[-1])).flatten(1)
        inputs = torch.cat([embeddings, torch.ones(len(embeddings), 1)], 1)
        found = torch.linalg.lstsq(inputs.double(), own.double(), driver="gelsd").solution.float()  # of least norm
        with torch.no_grad():
            self.linear.weight.copy_(found[:-1].T)
            self.linear.bias.copy_(found[-1])

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear(embedding).view(2, -1) + neutral(1, self.linear.out_features // 2)[0]


class Student:
    """A U-Net's chain of blocks on a plan's steps, beside the same chain in full."""

    def __init__(self, unet: Any, plan: CachePlan, table: SamplerTable) -> None:
        self.chain: BlockUNet = partition_blocks(unet.eval().requires_grad_(False))
        self._plan, self._table, self._handed_on = plan, table, list[Tensor]()
        for piece in self.chain.pieces:
            if isinstance(piece, Trunk) and piece.entry is not None:
                piece.entry.register_forward_hook(lambda _module, _inputs, found: self._handed_on.append(found))
        embeddings: Tensor = unet.time_embedding(unet.time_proj(table.timesteps.float())).detach()
        self.embeddings = embeddings / embeddings.norm(dim=1).mean()  # so that a learning rate is one of the outputs
        self._reused = [self._reused_at(step) for step in range(plan.num_steps)]

    def _reused_at(self, step: int) -> list[int]:
        runs = pattern_of(self._plan.passes[step], len(self.chain.blocks)) or (True,) * len(self.chain.blocks)
        return [block for block, run in enumerate(runs) if not run]

    def channels_reused(self, step: int) -> Tensor:
        """Which channels of all blocks a step reuses. Shapes: (channels,), bool."""
        reused, blocks = self._reused[step], self.chain.blocks
        return torch.cat([torch.full((block.branch.channels,), block.index in reused) for block in blocks])

    def adjustment(self, layer: ScaleShiftLayer, step: int) -> Tensor:
        """Scales and shifts of what a step reuses, 1 and 0 for what it runs. Shapes: (2, channels)."""
        return torch.where(self.channels_reused(step), layer(self.embeddings[step]), neutral(1, self.chain.channels)[0])

    def losses(self, layer: ScaleShiftLayer, x: Tensor, text: Tensor, guidance_scale: float) -> Iterator[Tensor]:
        """One run: at every step that reuses how far what its blocks hand on is from the teacher's, relative to that.

        Shapes: `x` (N, 4, h, w), what the run starts from; `text` (2 N, tokens, width), the unconditional half first.
        """
        states, predictions, kept = [x.double()], list[Tensor](), dict[str, Tensor]()
        for step, update in enumerate(self._table.recursion()):
            given = (states[step] * self._table.input_scale[step]).float().repeat(2, 1, 1, 1)
            arguments = {"timestep": self._table.timesteps[step].float(), "encoder_hidden_states": text}
            reuse = {name: kept[name] for block in self._reused[step] for name in self.chain.blocks[block].gives}
            adjustment = self.adjustment(layer, step).expand(len(given), -1, -1) if reuse else None
            with self._recorded() as own:
                e, stored = self.chain(given, **arguments, reuse=reuse, scale_shift=adjustment)
            if reuse:
                with torch.no_grad(), self._recorded() as wanted:
                    self.chain(given, **arguments)
                pairs = zip(own[self._reused[step][0] :], wanted[self._reused[step][0] :], strict=True)
                yield torch.stack([(a - b).square().mean() / b.square().mean() for a, b in pairs]).mean()
            kept |= {name: value.detach() for name, value in stored.items()}
            unconditional, conditional = e.detach().double().chunk(2)
            predictions.append(unconditional + guidance_scale * (conditional - unconditional))
            history = [(states[k], predictions[k]) for k in range(update.first, step + 1)]
            weighed = zip(history, update.weights[::3], update.weights[1::3], strict=True)
            states.append(torch.stack([of_x * x + of_e * e for (x, e), of_x, of_e in weighed]).sum(0))

    @contextmanager
    def _recorded(self) -> Generator[list[Tensor]]:
        self._handed_on = found = list[Tensor]()
        yield found


def train(
    pipe: Any,
    plan: CachePlan,
    prompts: Sequence[str],
    how: Training,
    told: Callable[[int, float], object] = lambda _number, _loss: None,
) -> CachePlan:
    """The plan with trained scales and shifts; it begins at those that it has.

    `told` is called after each run with its number and its mean loss, a relative squared error, in a step.
    `pipe` is diffusers' pipeline of the model. Round k draws prompts and seeds k * batch to (k + 1) * batch.

    Raises: `ValueError` for a plan without patterns of blocks, or without a sampler.
    """
    patterns = [name for name in plan.passes if is_pattern(name)]
    if plan.sampler is None or not patterns or {*plan.passes} - {FULL, *patterns}:
        raise ValueError(
            "expected a plan of full passes and patterns of blocks; make one with `fastcache plan --blocks`"
        )
    table = compile_sampler(make_scheduler(plan.sampler, dict(pipe.scheduler.config)), plan.num_steps)
    student = Student(pipe.unet, plan, table)
    start = neutral(plan.num_steps, student.chain.channels)
    layer = ScaleShiftLayer(
        student.embeddings, start if plan.scale_shift is None else torch.from_numpy(plan.scale_shift.table.copy())
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=how.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.rounds)
    for number in range(how.rounds):
        first = number * how.batch
        chosen = [prompts[k % len(prompts)] for k in range(first, first + how.batch)]
        with torch.no_grad():
            conditional, unconditional = pipe.encode_prompt(chosen, "cpu", 1, True)
        shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
        noise, _ = draw_noise(shape, range(first, first + how.batch), "cpu")
        x, found = noise * table.init_noise_sigma, list[float]()
        for loss in student.losses(layer, x, torch.cat([unconditional, conditional]), how.guidance_scale):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        schedule.step()
        told(number, sum(found) / len(found))
    with torch.no_grad():
        made = torch.stack([student.adjustment(layer, step) for step in range(plan.num_steps)])
    name = plan.made_by.removesuffix(", scale and shift")
    return replace(plan, scale_shift=ScaleShift.of(made.numpy()), made_by=f"{name}, trained scale and shift")


def line(number: int, loss: float, how: Training) -> str:
    """What is said after a run."""
    return f"run {number + 1} of {how.rounds}: relative squared error {loss:.3e} a step"


def main(
    plan: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A plan of `fastcache plan --blocks`.")],
    output: Annotated[Path, typer.Option(help="The trained plan.")],
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="A diffusers folder; the bundled model if left out.")
    ] = MODEL_DIRECTORY,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A prompt a line; the bundled model has its own.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of the student.")] = Training.rounds,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a run.")] = Training.batch,
    learning_rate: float = Training.learning_rate,
    guidance_scale: float = Training.guidance_scale,
) -> None:
    """Train the scale and shift of a plan of blocks. The same command gives the same plan."""
    from diffusers import StableDiffusionPipeline

    try:
        own = CachePlan.from_json(plan.read_text())
    except ValueError as error:
        raise typer.BadParameter(f"{plan}: {error}") from None
    how = Training(rounds, batch, learning_rate, guidance_scale)
    texts = prompts.read_text().splitlines() if prompts else calibration_prompts(rounds * batch)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    try:
        made = train(pipe, own, texts, how, lambda number, loss: typer.echo(line(number, loss, how), err=True))
    except ValueError as error:
        raise typer.BadParameter(f"{plan}: {error}") from None
    write_whole(output, made.to_json().encode())
    typer.echo(output)


if __name__ == "__main__":
    typer.run(main)
