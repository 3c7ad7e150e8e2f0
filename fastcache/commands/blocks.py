"""What `plan --blocks --threshold` does: measure how blocks change, schedule each, repair what is reused, draw it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcache.commands.options import prompts_or_own, require_blocks
from fastcache.console import progress

if TYPE_CHECKING:
    from fastcache.loop.plan import CachePlan


def scheduled_blocks(engines: Path, flags: Mapping[str, Any]) -> tuple[CachePlan, dict[str, Any]]:
    """Block Caching's plan for a threshold, with a scale and a shift, and what to say of it.

    Raises: `ValueError` for a bundle without blocks.
    """
    from fastcache.bundle.bundle import open_bundle
    from fastcache.evaluate.judges import calibration_prompts
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.planning.blocks import block_plan, measured_changes, share_reused, with_scale_shift
    from fastcache.planning.walks import Walks
    from fastcache.sampler.scheduler import make_scheduler
    from fastcache.sampler.table import compile_sampler

    with progress() as say:
        pipe = FastCachePipeline(open_bundle(engines))
        manifest = pipe.bundle.manifest
        require_blocks(manifest, engines)
        usual, wanted = manifest.model.defaults.guidance_scale, flags["guidance_scale"]
        guidance, most = usual if wanted is None else wanted, flags["num_prompts"]
        file = None if flags["prompts"] is None else Path(flags["prompts"])
        prompts = prompts_or_own(file, manifest, lambda: calibration_prompts(most))[:most]
        table = compile_sampler(make_scheduler(flags["sampler"], manifest.model.scheduler), flags["steps"])
        walks = Walks(pipe, prompts, range(len(prompts)), table=table, guidance_scale=guidance)
        say(f"measuring {len(manifest.blocks)} blocks in {table.num_calls} full steps of {len(prompts)} pictures")
        changes = measured_changes(walks, manifest.blocks)
        made = block_plan(manifest, flags["sampler"], changes, flags["threshold"])
        if not flags["no_scale_shift"]:
            say(f"fitting scales and shifts: {2 * table.num_calls} full steps of {len(prompts)} pictures at most")
            made = with_scale_shift(walks, made, manifest.blocks)
    if flags["chart"] is not None:
        from fastcache.planning.schedule_chart import draw_schedule

        draw_schedule(made, manifest.blocks, changes, flags["chart"])
    passes = [manifest.passes[name].multiply_adds for name in made.passes]
    return made, {
        "calibration_samples": len(prompts),
        "blocks_reused": f"{share_reused(made, len(manifest.blocks)):.0%}",
        "multiply_adds": f"{sum(passes) / (passes[0] * len(passes)):.0%} of the uncached run's" if passes[0] else "?",
    }
