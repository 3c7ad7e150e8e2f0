"""torch's own compiler, which torch keeps to itself: the only file that touches `torch._inductor`.

Only builds need it, so a process that loads packages carries none of it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastcache_engines.inductor.loader import untried

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


def _of(module: str, name: str) -> Any:
    """Something of torch's. Raises: `BackendUnavailable` for a torch without it."""
    try:
        return getattr(importlib.import_module(f"torch._inductor.{module}".removesuffix(".")), name)
    except (ImportError, AttributeError) as error:
        raise untried(".".join(part for part in ("torch._inductor", module, name) if part)) from error


def missing(device: str) -> str | None:
    """What a build for a device lacks on this machine, and what to do; None where it has all.

    Raises: `BackendUnavailable` for a torch whose compiler is another one.
    """
    find = _of("cpp_builder", "get_cpp_compiler")
    try:
        find()
    except Exception:  # a compiler that is missing, one that fails and one that may not run: no common base class
        return "AOTInductor builds with a C++ compiler; install g++, or name one in the environment variable CXX"
    if device == "cpu":
        return None
    if importlib.util.find_spec("triton") is None:
        return "AOTInductor builds for GPUs with Triton; run: pip install triton"
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or not os.path.isfile(os.path.join(home, "include", "cuda.h")):
        return (
            "AOTInductor builds for GPUs with a CUDA toolkit, of which PyTorch finds no include/cuda.h; install one of "
            "PyTorch's own CUDA version, or name its folder in the environment variable CUDA_HOME"
        )
    return None


def vector_instructions() -> str:
    """The processor's vector instructions that a build uses."""
    return str(_of("cpu_vec_isa", "pick_vec_isa")())


def compile_program(
    module: nn.Module, args: Any, kwargs: Any, channels_last: bool
) -> tuple[list[Path], dict[str, Tensor]]:
    """The files that make up a package, and the constants that it needs, by its own names for them.

    Raises: what Inductor, Triton and the compiler raise; `BackendUnavailable` for a torch whose compiler is another.
    """
    aot_compile, config = _of("", "aot_compile"), _of("", "config")
    known = config.get_config_copy()
    settings = {name: value for name, value in _OPTIONS.items() if name in known}
    settings |= {"layout_optimization": channels_last, "force_layout_optimization": channels_last}
    parts: Sequence[Any] = aot_compile(module, args, kwargs, options=settings)
    constants = [part for part in parts if isinstance(part, Mapping)]
    return (
        [Path(part) for part in parts if isinstance(part, str)],
        {name: tensor.detach() for found in constants for name, (tensor, _) in found.items()},
    )


def write_package(file: Path, parts: Sequence[Path]) -> None:
    """Put the files of a package into one."""
    _of("package", "package_aoti")(str(file), [str(part) for part in parts])


@contextlib.contextmanager
def own_caches(folder: Path) -> Generator[None]:
    """Inductor's and Triton's caches for this alone: nothing of another build is taken, and nothing is left."""
    with _of("utils", "fresh_cache")(dir=folder):
        yield


@contextlib.contextmanager
def quiet() -> Generator[None]:
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
