"""`build-engines`, `inspect` and `verify`: bundles made, shown and checked; `doctor`: what could be made here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcache.commands.options import (
    BUILD_SHARES,
    STARTING,
    Device,
    Height,
    Json,
    OutputFolder,
    RandomWeights,
    Revision,
    TrustedKey,
    Width,
    check_writable,
    existing,
    existing_of,
    generate_with,
)
from fastcache.console import CheckFailed, debug_asked, next_step, notes, print_json, print_table, progress

if TYPE_CHECKING:
    from fastcache.bundle.bundle import Bundle
    from fastcache.bundle.manifest import Manifest, Parity
    from fastcache.bundle.recipe import Recipe
    from fastcache.health.verify import Verification

_BY_COMMAS = ("sizes", "components", "compute_capability")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A bundle.", callback=existing_of)]


def doctor(json_: Json = False) -> None:
    """Say what this machine can build and what it can run, and why not.

    Example: fastcache doctor
    """
    from fastcache.health.doctor import examine

    result = examine()
    if json_:
        print_json(result)
        return
    print_table(
        f"Python {result['python']}, {result['device']}, {result['threads']} threads",
        ["backend", "device", "builds", "runs", "version", "dtypes", "what to know"],
        [
            [
                *(b["name"], b["device"], *("yes" if b[can] else "no" for can in ("can_build", "can_run"))),
                *(b["version"] or "-", " ".join(b["dtypes"]), b["reason"]),
            ]
            for b in result["backends"]
        ],
    )
    auto = result["auto"]
    picked = f"{auto['backend']} in {auto['dtype']}" if auto["backend"] else "nothing"
    typer.echo(f"auto picks {picked} on the {auto['device']}\n{auto['reason']}")
    typer.echo(f"kernels: {result['kernels']['used']} in the loop; {result['kernels']['reason']}")
    typer.echo(f"loop on the CPU: {result['cpu_loop']['reason']}")
    next_step("fastcache build-engines --model demo --output engines/demo")


def build_engines(
    ctx: typer.Context,
    output: OutputFolder,
    model: Annotated[
        str | None, typer.Option(help="A folder in diffusers' layout, a hub id, demo, or a preset.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A TOML recipe, by path or name.")] = None,
    revision: Revision = None,
    backend: Annotated[str, typer.Option(help="auto or a name that doctor lists.")] = "auto",
    branch_id: Annotated[
        str, typer.Option(help="Where to cut the U-Net, by commas: 0 is the shallowest place, and the fastest.")
    ] = "0",
    cut: Annotated[str, typer.Option(help="auto, plain or projected.")] = "auto",
    blocks: Annotated[str | None, typer.Option(help="Engines apart for blocks: transformer, resnet or both.")] = None,
    device: Device = None,
    height: Height = None,
    width: Width = None,
    sizes: Annotated[str | None, typer.Option(help="Several, the usual first: 512x512,768x512 (width first).")] = None,
    batch: Annotated[str, typer.Option(help="Images at once: N, or MIN:OPT:MAX.")] = "1:1:4",
    max_tokens: Annotated[
        int | None, typer.Option(help="How many tokens a prompt may have, if it is given as embeddings.")
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(help="A LoRA to merge, PATH[:WEIGHT]; repeatable.")] = None,
    controlnet: Annotated[list[str] | None, typer.Option(help="A ControlNet's folder; repeatable.")] = None,
    t2i_adapter: Annotated[str | None, typer.Option(help="A T2I-Adapter's folder.")] = None,
    ip_adapter: Annotated[str | None, typer.Option(help="An IP-Adapter, its image_encoder folder beside it.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the fastest here whose check holds), fp32, fp16 or bf16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8: the U-Net's layers in 8 bits (OpenVINO, ORT).")] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE's folder: AutoencoderKL or AutoencoderTiny.")] = None,
    vae_tile: Annotated[int | None, typer.Option(help="Decode in overlapping squares of so many pixels.")] = None,
    preview_vae: Annotated[
        str | None, typer.Option(help="A small VAE's folder, an AutoencoderTiny say, for pictures on their way.")
    ] = None,
    components: Annotated[str | None, typer.Option(help="Any of unet,vae,text; all if left out.")] = None,
    random_weights: RandomWeights = False,
    compute_capability: Annotated[
        str | None, typer.Option(help="The GPUs to build for, as 8.6,8.9 (tensorrt-rtx only).")
    ] = None,
    onnx_only: Annotated[bool, typer.Option("--onnx-only", help="Stop at the backend's ONNX graphs.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compute the first norm by fastcache's own kernel (inductor only).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build anyway; replace another bundle.")] = False,
    sign: Annotated[
        Path | None,
        typer.Option(help="A private key, PEM of Ed25519, to sign the bundle with, also one that is there."),
    ] = None,
    json_: Json = False,
) -> None:
    """Build a bundle from a model: a folder with the U-Net compiled twice, and whatever else draws a picture.

    Example: fastcache build-engines --model demo --output engines/demo
    """
    if (model is None) == (recipe is None):
        raise ValueError("expected either --model or --recipe, got " + ("neither" if model is None else "both"))
    check_writable(output)
    if recipe is not None and (told := _told(ctx)):
        raise ValueError(f"expected --recipe in place of {', '.join(told)}, got both; write it into the recipe")
    chosen = _recipe(ctx.params)
    with progress(BUILD_SHARES if quantize is None else None) as say:  # choosing 8-bit layers takes most of a build
        say(STARTING)
        from fastcache.compile import hired

        if force or not output.exists():
            hired.begin()
        import fastcache

        bundle = fastcache.build_engines(chosen, output, force=force, sign=sign, progress=say)
    _show_bundle(bundle, json_)
    if not (json_ or onnx_only):
        next_step(generate_with(output, bundle.manifest.model.name, "--cache-interval 3"))


def _told(ctx: typer.Context) -> list[str]:
    """The flags of a recipe's fields that say something."""
    from fastcache.bundle.recipe import Recipe

    fields = [flag for flag in ctx.command.params if flag.name in Recipe.model_fields]
    return [flag.opts[0] for flag in fields if ctx.params[str(flag.name)] not in (flag.default, (), [])]


def _recipe(flags: Mapping[str, Any]) -> Recipe:
    """The recipe in a file, or of the flags that are its fields by name."""
    from fastcache.bundle.recipe import Recipe, find_recipe, recipe_from, recipe_from_toml

    if flags["recipe"] is not None:
        return recipe_from_toml(find_recipe(flags["recipe"]))
    given: dict[str, Any] = {name: flags[name] for name in Recipe.model_fields if flags.get(name) not in (None, (), [])}
    given |= {name: tuple(given[name].split(",")) for name in _BY_COMMAS if name in given}
    return recipe_from(given)


def _show_bundle(bundle: Bundle, as_json: bool) -> None:
    manifest = bundle.manifest
    if as_json:
        print_json({"path": str(bundle.path), **manifest.to_json()})
        return
    version = manifest.versions.get(manifest.backend, "(graphs only)")
    branches = ", ".join(map(str, manifest.branches))
    steered = "".join(f" with {entry.kind.replace('_', '-')} {entry.name}" for entry in manifest.model.controls)
    typer.echo(
        f"{bundle.path}: {manifest.model.name}{steered}, branch {branches} of {manifest.num_branches}, "
        f"{manifest.cut} cut, {', '.join(map(str, manifest.sizes))}, {manifest.profiles['batch']} images, "
        f"{manifest.dtype}, {manifest.backend} {version} on {manifest.device}\n"
        f"built in {manifest.build_seconds:.0f} s; on {manifest.parity.measured_on}: {_figures(manifest.parity)}"
    )


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle; with --branches, also a model or a preset.")],
    branches: Annotated[bool, typer.Option("--branches", help="Only what each branch id costs.")] = False,
    height: Annotated[int | None, typer.Option(help="With --branches of a model: image height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="With --branches of a model: image width in pixels.")] = None,
    json_: Json = False,
) -> None:
    """Show what a bundle holds: inputs, outputs, weights, versions, device and how it was made. Nothing is loaded.

    With --branches: how many multiply-adds a step takes at each place where the U-Net can be cut, of a bundle, or of a
    model or a preset that is not built.

    Example: fastcache inspect demo-output/engines, or fastcache inspect sd15 --branches
    """
    from fastcache.bundle.bundle import MANIFEST, Bundle, read_manifest
    from fastcache.commands.branches import count_work, show_branches
    from fastcache.health.facts import engine_facts

    if branches and not (folder / MANIFEST).is_file():
        show_branches(str(folder), *count_work(str(folder), height, width), as_json=json_)
        return
    manifest = read_manifest(existing(folder) or folder)
    work = manifest.model.name, manifest.height, manifest.width, manifest.work
    if branches:
        show_branches(*work, as_json=json_)
        return
    facts = engine_facts(folder, manifest)
    if json_:
        print_json({**manifest.to_json(), "engine_facts": facts})
        return
    _show_bundle(Bundle(folder, manifest), False)
    rows: list[list[str]] = []
    if manifest.blocks:
        _show_blocks(manifest)
    for role, engine in manifest.engines.items():
        if role in manifest.chain[1:]:
            continue  # what lies between pieces is of the builder's making
        for kind, specs in (("in", engine.inputs), ("out", engine.outputs)):
            rows += [[f"{role} {kind}", s.name, s.dtype, "x".join(map(str, s.shape))] for s in specs]
    print_table("Engines", ["engine", "tensor", "dtype", "shape"], rows)
    print_table(
        "What the files say of themselves",
        ["engine", "file", "arithmetic", "facts"],
        [
            [role, e.file, e.dtype, _facts_text(facts[role])]
            for role, e in manifest.engines.items()
            if role not in manifest.chain[1:]
        ],
    )
    if manifest.work:
        show_branches(*work)
    files = [[file.name, f"{file.bytes:,}", file.sha256[:16]] for file in manifest.files]
    print_table("Files", ["file", "bytes", "SHA-256"], files)
    typer.echo(
        f"weights {manifest.weights_bytes:,} bytes, of which full and shallow share {manifest.duplicated_bytes:,}\n"
        f"model weights SHA-256 {manifest.weights_sha256}\nbundle SHA-256        {manifest.bundle_sha256}\n"
        f"built {manifest.created} with {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}"
    )


def _show_blocks(manifest: Manifest) -> None:
    full = manifest.named_passes["full"].multiply_adds
    pieces = len(manifest.chain) - len(manifest.blocks)
    others = f"the other {pieces} pieces always run" if manifest.chain else "each in an If of the full engine"
    print_table(
        f"Blocks that a pass may leave out; {others}",
        ["block", "place", "channels", "multiply-adds", "of the full pass"],
        [
            [str(k), b.place, str(b.channels), f"{b.multiply_adds:,}", f"{b.multiply_adds / full:.1%}" if full else "?"]
            for k, b in enumerate(manifest.blocks)
        ],
    )


def _facts_text(facts: dict[str, Any]) -> str:
    """The facts in one cell; tensors have a table of their own."""
    shown = {key: value for key, value in facts.items() if key not in ("inputs", "outputs", "sha256", "operators")}
    if "operators" in facts:
        shown["most"] = " ".join(f"{name}:{count}" for name, count in list(facts["operators"].items())[:4])
    return ", ".join(
        f"{key} {value if isinstance(value, str | int) else json.dumps(value)}" for key, value in shown.items()
    )


def verify(folder: Folder, trusted_key: TrustedKey = None, json_: Json = False) -> None:
    """Check every hash of a bundle, and that its engines compute what the model does.

    Engines that were built here for another machine are checked as far as they can be, and the result says so.

    Example: fastcache verify demo-output/engines
    """
    from fastcache.health.verify import verify_bundle

    found = verify_bundle(folder, trusted_key)
    if json_:
        print_json(found.to_json())
    elif not found.problems:
        signed = "" if trusted_key is None else f", signed by the key of {trusted_key}"
        typer.echo(f"{folder}: {len(found.files)} files as built{signed}; {_parity_text(found)}")
    if found.problems:
        if found.parity is not None and debug_asked():
            _show_layers(folder, found.manifest)
        raise CheckFailed(f"{'; '.join(found.problems)} in {folder}; build the bundle again")


def _show_layers(folder: Path, manifest: Manifest) -> None:
    """On stderr: the first tensors that leave the tolerance, in the order in which they are computed."""
    from fastcache.health.layers import compare_layers

    wrong = [layer for layer in compare_layers(folder, manifest) if not layer.error <= manifest.parity.tolerance]
    if not wrong:
        notes.print("every layer is what its graph says, so the graph or its weights are not the model's", markup=False)
        return
    rows = [[layer.role, layer.operator, layer.tensor, f"{layer.error:.1e}"] for layer in wrong[:20]]
    title = f"{len(wrong)} tensors beyond {manifest.parity.tolerance:g}, the first {len(rows)}"
    print_table(title, ["engine", "operator", "tensor", "error"], rows, console=notes)


def _figures(parity: Parity) -> str:
    return (
        f"full vs model {parity.full_vs_model:.1e}, shallow vs full {parity.shallow_vs_full:.1e} "
        f"(tolerance {parity.tolerance:g})"
    )


def _parity_text(found: Verification) -> str:
    """What was measured now, or that nothing was, and what the build measured instead."""
    if found.parity is not None:
        return _figures(found.parity)
    built = found.manifest.parity
    return f"the engines were NOT run: {found.not_run}. At the build, on {built.measured_on}: {_figures(built)}"
