"""A wheel of this checkout, installed with an extra in an environment of its own: does it work, how large, how long.

    python tools/fresh_install.py cpu serve --json install.json

For each extra: a new environment outside the checkout, the wheel and the extra into it with the pinned versions, the
packages of the extra imported, and, where the extra brings an engine for CPUs, the bundled model built and drawn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
# What each extra is for, by the modules that it brings; "-" stands for the base alone.
MODULES = {
    "-": ("fastcache", "torch", "diffusers"),
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("polygraphy",),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "serve": ("fastapi", "uvicorn", "fastcache.serve.http.server"),
    "ray": ("ray.serve", "ray.data", "fastcache.serve.ray"),
    "bench": ("DeepCache", "matplotlib", "torchmetrics"),
    "lora": ("peft",),
    "sign": ("cryptography",),
    "all": ("onnxruntime", "openvino", "ray.serve", "DeepCache", "peft", "cryptography"),
}
DRAWS = {"cpu": "onnxruntime", "openvino": "openvino", "all": "openvino"}


def run(command: list[str | Path], folder: Path, environment: dict[str, str]) -> float:
    """Run a command to its end; returns the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - start


def size_mb(folder: Path) -> float:
    """What files take on the disk, each once."""
    stats = {(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for file in folder.rglob("*") if (stat := file.lstat())}
    return round(sum(stats.values()) / 1e6, 1)


def try_extra(extra: str, wheel: Path, folder: Path) -> dict[str, Any]:
    """Install one extra, import what it brings, and draw with it where it can."""
    python = folder / "venv" / "bin" / "python"
    command = folder / "venv" / "bin" / "fastcache"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = kept | {"XDG_CACHE_HOME": str(folder / "cache")}
    run([sys.executable, "-m", "venv", folder / "venv"], folder, environment)
    pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    took = {"torch_s": run([*pip, "torch"], folder, environment)}
    wish = f"{wheel}" if extra == "-" else f"{wheel}[{extra}]"
    took["install_s"] = run([*pip, wish], folder, environment)
    result: dict[str, Any] = {"extra": extra, "size_mb": size_mb(folder / "venv")}
    run([python, "-c", "\n".join(f"import {module}" for module in MODULES[extra])], folder, environment)
    run([command, "doctor", "--json"], folder, environment)
    if extra in DRAWS:
        build = [command, "build-engines", "--model", "demo", "--backend", DRAWS[extra], "--output", "engines"]
        took["build_s"] = run([*build], folder, environment)
        prompt = "a large blue square at the right on a white background"
        draw = [command, "generate", "--engines", "engines", "--prompt", prompt, "--steps", "20"]
        took["draw_s"] = run([*draw, "--cache-interval", "3", "--output", "a.png"], folder, environment)
        result["picture_bytes"] = (folder / "a.png").stat().st_size
    return result | {name: round(seconds, 1) for name, seconds in took.items()}


def main(
    extras: Annotated[list[str], typer.Argument(help="Extras to try, - for none.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """Build a wheel and install it with each extra, every time in a new environment outside the checkout."""
    if unknown := set(extras) - MODULES.keys():
        raise typer.BadParameter(f"expected extras out of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastcache-install-") as place:
        wheels = Path(place) / "wheels"
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT]
        built = run([*build], Path(place), dict(os.environ))
        (wheel,) = wheels.glob("fastcache_diffusion-*.whl")
        typer.echo(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, built in {built:.0f} s")
        for extra in extras:
            folder = Path(place) / f"with-{extra}"
            folder.mkdir()
            results.append(try_extra(extra, wheel, folder))
            typer.echo(json.dumps(results[-1]))
    if json_file is not None:
        json_file.write_text(json.dumps({"installs": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
