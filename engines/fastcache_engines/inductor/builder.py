"""Programs of torch.export -> packages compiled by AOTInductor, and one file of the weights that they share.

What only a build needs, so that a process that loads packages carries no compiler.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcache_engines.inductor import compiler
from fastcache_engines.inductor.weights import SUFFIX, Package, Store, compute_capability, features, reason_of
from fastcache_engines.machine import BackendUnavailable, device_kind, ieee_float32
from fastcache_engines.protocol import BuildOptions, Program
from fastcache_engines.tensors import TensorSpec


def build_packages(graphs: Mapping[str, Program], folder: Path, options: BuildOptions) -> dict[str, str]:
    """See `inductor.build`."""
    store, packages = Store(), {}
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".inductor-") as scratch,
        compiler.quiet(),
        compiler.own_caches(Path(scratch)),
        ieee_float32(),
    ):
        for name, program in _by_name(graphs):
            package = _describe(name, program, options)
            options.progress(f"compiling {name} with AOTInductor")
            constants = _compile(program, folder / f"{name}.pt2", Path(scratch), options)
            packages[name] = dataclasses.replace(package, constants=store.add(name, constants))
    store.write(folder / f"{next(iter(graphs))}{SUFFIX}", packages)
    return {role: f"{role}.pt2" for role in graphs}


def _by_name(graphs: Mapping[str, Program]) -> Generator[tuple[str, Program]]:
    """Each role's program, and behind it those of its other sizes."""
    for role, program in graphs.items():
        yield role, program
        for place, other in enumerate(program.others, 1):
            yield f"{role}.{place}", dataclasses.replace(program, exported=other, others=())


def _describe(role: str, program: Program, options: BuildOptions) -> Package:
    """What a program takes and gives, and what its package will need; its constants are not known yet."""
    from torch.utils import _pytree as pytree

    exported: Any = program.exported
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if "val" in node.meta}
    takes = [values[name] for name in exported.graph_signature.user_inputs]
    gives = [values[name] for name in exported.graph_signature.user_outputs]
    places: dict[str, int] = pytree.tree_unflatten(range(len(takes)), exported.call_spec.in_spec)[1]["inputs"]
    if set(places) != set(program.inputs) or len(gives) != len(program.outputs):
        raise ValueError(
            f"expected the {role} program to take {', '.join(program.inputs)} and give {', '.join(program.outputs)}, "
            f"got one that takes {', '.join(places)} and gives {len(gives)} tensors"
        )
    limits = [int(limit.upper) for limit in exported.range_constraints.values() if limit.upper < 2**31]
    if options.rows[2] > min(limits, default=options.rows[2]):
        raise ValueError(f"expected at most {min(limits)} rows, as the {role} program has it, got {options.rows[2]}")
    return Package(
        torch=torch.__version__,
        device=device_kind(options.device),
        isa=compiler.vector_instructions(),
        features=features(),
        compute_capability=compute_capability(options.device),
        inputs=tuple(_spec(name, takes[places[name]]) for name in program.inputs),
        outputs=tuple(_spec(name, value) for name, value in zip(program.outputs, gives, strict=True)),
        arguments=tuple(sorted(places, key=lambda name: places[name])),
        max_rows=min(limits, default=None),
        constants={},
    )


def _spec(name: str, value: Tensor) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else "batch" for size in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)


def _compile(program: Program, file: Path, scratch: Path, options: BuildOptions) -> dict[str, Tensor]:
    """Write one package without its constants, and return these by its own names for them."""
    from torch.export.passes import move_to_device_pass

    # cuDNN's kernels for tensor cores want images channels last; inductor of itself would not where the batch is free.
    # On a CPU that made SD1.5 no faster in bf16, and 4% slower in fp32.
    channels_last = device_kind(options.device) == "cuda" and options.dtype != "fp32"
    exported = program.exported
    try:
        if device_kind(options.device) != "cpu":
            exported = move_to_device_pass(exported, options.device)
        module: Any = exported.module(check_guards=False)
        if channels_last:
            _lay_out(module)
        args, kwargs = exported.example_inputs or ((), {})
        parts, constants = compiler.compile_program(module, args, kwargs, channels_last)
        compiler.write_package(file, [_emptied(part, scratch) if part.suffix == ".cpp" else part for part in parts])
    except (OSError, MemoryError, BackendUnavailable):
        raise
    except Exception as error:  # inductor's, Triton's and the compiler's errors share no base class
        raise ValueError(f"AOTInductor cannot compile the {file.stem} graph: {reason_of(error)}") from error
    return constants


def _emptied(source: Path, scratch: Path) -> Path:
    """A source file's stand-in for the package, whose loader asks for its name; it tells the build machine's paths.

    The file itself stays: inductor takes it for written, should another program have the same code.
    """
    (scratch / "emptied").mkdir(exist_ok=True)
    stand_in = scratch / "emptied" / source.name
    stand_in.touch()
    return stand_in


def _lay_out(module: nn.Module) -> None:
    """Lay convolutions' weights out as inductor wants them; else the package would do so in every run."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() == 4:
                laid_out = parameter.detach().contiguous(memory_format=torch.channels_last)
                setattr(owner, name, nn.Parameter(laid_out, requires_grad=False))
