"""Programs of torch.export -> packages compiled by AOTInductor, and one file of the weights that they share.

What only a build needs, so that a process that loads packages carries no compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastcache_engines import BuildOptions, TensorSpec
from fastcache_engines._inductor_weights import SUFFIX, Package, Store, compute_capability, features, reason_of

if TYPE_CHECKING:
    from fastcache_engines.inductor import Program

_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # they come as tensors; no pickle is written
    "aot_inductor.use_runtime_constant_folding": False,
    # They would lie in a folder that all builds of a machine share, and take 10 s to make where they save 5.
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,  # the build machine's paths
    "cpp.dynamic_threads": True,  # as many threads as the running process has, not the building one
    "freezing": False,  # it packs weights into layouts that no file holds and no two engines share
}


def build(graphs: Mapping[str, Program], folder: Path, options: BuildOptions) -> dict[str, str]:
    """See `inductor.build`."""
    from torch._inductor.utils import fresh_cache

    store, packages = Store(), {}
    # Inductor's and Triton's caches of this build's own: nothing of another build is taken, and nothing is left.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".inductor-") as scratch, _quiet(), fresh_cache(dir=scratch):
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
    from torch._inductor.cpu_vec_isa import pick_vec_isa
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
        device=options.device,
        isa=str(pick_vec_isa()),
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
    from torch._inductor import aot_compile, config
    from torch._inductor.package import package_aoti
    from torch.export.passes import move_to_device_pass

    known: Any = config
    settings = {name: value for name, value in _OPTIONS.items() if name in known.get_config_copy()}
    # cuDNN's kernels for tensor cores want images channels last; inductor of itself would not where the batch is free.
    # On a CPU that made SD1.5 no faster in bf16, and 4% slower in fp32.
    channels_last = options.device == "cuda" and options.dtype != "fp32"
    settings |= {"layout_optimization": channels_last, "force_layout_optimization": channels_last}
    exported = program.exported
    try:
        if options.device != "cpu":
            exported = move_to_device_pass(exported, options.device)
        module: Any = exported.module(check_guards=False)
        if channels_last:
            _lay_out(module)
        args, kwargs = exported.example_inputs or ((), {})
        files: Any = aot_compile(module, args, kwargs, options=settings)
        paths = [Path(part) for part in files if isinstance(part, str)]
        package_aoti(str(file), [str(_emptied(path, scratch) if path.suffix == ".cpp" else path) for path in paths])
    except (OSError, MemoryError):
        raise
    except Exception as error:  # inductor's, Triton's and the compiler's errors share no base class
        raise ValueError(f"AOTInductor cannot compile the {file.stem} graph: {reason_of(error)}") from error
    found = [part for part in files if isinstance(part, Mapping)]
    return {name: tensor.detach() for weights in found for name, (tensor, _) in weights.items()}


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


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep inductor's logs and deprecation warnings out of a user's terminal; errors are raised all the same."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
