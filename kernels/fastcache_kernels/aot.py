"""`aot.toml` and the Triton sources -> the sources of a shared library with every kernel for every architecture.

Run by CMake, and needs no GPU: Triton compiles to cubin and PTX, which go into C and assembler files beside a manifest
that says what each launch function takes. Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache_kernels.manifest import ALIGNMENT, EXACT_FROM, KERNELS, LIBRARY, MANIFEST, SOURCE, source_hash

WARP_SIZE = 32
PTX_VERSION = 80  # what drivers of CUDA 12.0 read; left to Triton it asks for a driver as new as its own ptxas
# Triton gives every kernel two addresses of its own at the end, for memory that these kernels do not use.
HIDDEN_PARAMETERS = 2

_C_TYPES = {"i32": "int32_t", "fp32": "float"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parameter:
    """One of a kernel's run-time parameters; an aligned one is a multiple of 16."""

    name: str
    type: str
    aligned: bool


@dataclass(frozen=True)
class Specification:
    """One kernel for certain dtypes and constants; `symbol` is its launch function's name."""

    symbol: str
    kernel: str
    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[str, int], ...]
    num_warps: int


@dataclass(frozen=True)
class CompiledImage:
    """A specification compiled for one architecture, with the name of its entry."""

    architecture: int
    entry: str
    shared_bytes: int
    cubin: bytes
    ptx: str


def specifications(config: Mapping[str, Any]) -> Iterator[Specification]:
    """Every variant that `aot.toml` lists.

    Raises: `ValueError` for a kernel that there is not.
    """
    for table in config["kernel"]:
        name: str = table["name"]
        if name not in KERNELS:
            raise ValueError(f"aot.toml: expected a kernel out of {', '.join(KERNELS)}, got {name!r}")
        for dtype, configuration in itertools.product(table["dtypes"], table["configurations"]):
            constants = {key: value for key, value in configuration.items() if key != "num_warps"}
            yield Specification(
                "_".join(["fastcache", name, dtype, *map(str, constants.values())]),
                name,
                tuple(_parameter(key, text.format(dtype=dtype)) for key, text in table["parameters"].items()),
                tuple(constants.items()),
                configuration["num_warps"],
            )


def _parameter(name: str, text: str) -> Parameter:
    kind, _, multiple = text.partition(":")
    if multiple not in ("", str(ALIGNMENT)) or (not kind.startswith("*") and kind not in _C_TYPES):
        raise ValueError(
            f"aot.toml: expected {name} to be an address (*), i32 or fp32, then :{ALIGNMENT} or nothing, got {text!r}"
        )
    return Parameter(name, kind, bool(multiple))


def compile_kernel(specification: Specification, architecture: int) -> CompiledImage:
    """Compile one variant for one architecture.

    Raises: `ValueError` where its parameters are not the kernel's, or it needs memory that the launcher does not give.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function: Any = getattr(importlib.import_module(f"fastcache_kernels.{SOURCE}"), specification.kernel)
    constants = dict(specification.constants)
    listed = [parameter.name for parameter in specification.parameters] + list(constants)
    if listed != function.arg_names:
        raise ValueError(
            f"aot.toml: expected the parameters of {specification.kernel}, {', '.join(function.arg_names)}, "
            f"got {', '.join(listed)}"
        )
    signature = {parameter.name: parameter.type for parameter in specification.parameters}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", ALIGNMENT]]
        for i, parameter in enumerate(specification.parameters)
        if parameter.aligned
    }
    options = {"num_warps": specification.num_warps, "enable_fp_fusion": True}
    if architecture < EXACT_FROM:
        options["ptx_version"] = PTX_VERSION
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, WARP_SIZE),
        options=options,
    )
    metadata: Any = compiled.metadata
    ptx: str = compiled.asm["ptx"]
    taken = len(re.findall(r"\.param ", ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]))
    wanted = len(specification.parameters) + HIDDEN_PARAMETERS
    if taken != wanted or metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(
            f"{specification.symbol}: expected {wanted} parameters and no scratch memory, got {taken} and "
            f"{metadata.global_scratch_size + metadata.profile_scratch_size} bytes; this Triton launches otherwise"
        )
    return CompiledImage(architecture, metadata.name, metadata.shared, compiled.asm["cubin"], ptx)


def _compile_all(
    listed: Sequence[Specification], architectures: Sequence[int], jobs: int
) -> dict[Specification, list[CompiledImage]]:
    tasks = [(specification, number) for specification in listed for number in architectures]
    _log.info("compiling %d kernels for %d architectures", len(listed), len(architectures))
    # spawn: a child starts from the environment, and not amid what Triton holds here
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        images = list(pool.map(compile_kernel, *zip(*tasks, strict=True), chunksize=4))
    each = len(architectures)
    return {specification: images[i * each : (i + 1) * each] for i, specification in enumerate(listed)}


def build(config: Mapping[str, Any], folder: Path, jobs: int) -> None:
    """Compile all of `config`, and write the library's sources and its manifest to `folder`.

    Raises: `ValueError` for a config that does not fit the kernels.
    """
    architectures: list[int] = config["architectures"]
    ptx: int | None = config["ptx"]
    if ptx is not None and (ptx not in architectures or ptx >= EXACT_FROM):
        raise ValueError(
            f"aot.toml: expected ptx to be one of architectures below {EXACT_FROM}, got {ptx}; "
            "PTX of newer ones is for these alone"
        )
    listed = list(specifications(config))
    compiled = _compile_all(listed, architectures, jobs)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tables, embedded = list[str](), list[str]()
    for specification, images in compiled.items():
        files = list(_images(specification, images, ptx))
        for name, content, *_ in files:
            (folder / "images" / name).write_bytes(content)
            embedded.append(_embedded(name))
        tables.append(_table(specification, images[0].entry, files))
    (folder / "fastcache_kernels.h").write_text(_header(listed), encoding="utf-8")
    (folder / "kernels.c").write_text(_source(tables), encoding="utf-8")
    (folder / "images.S").write_text("".join(embedded) + '.section .note.GNU-stack,"",%progbits\n', encoding="utf-8")
    (folder / MANIFEST).write_text(json.dumps(_manifest(config, compiled), indent=1) + "\n", encoding="utf-8")


def only(config: Mapping[str, Any], architectures: Sequence[int]) -> dict[str, Any]:
    """The config for some of its architectures; without the one of its PTX, no GPU but theirs is served.

    Raises: `ValueError` for one that it does not have.
    """
    known: list[int] = config["architectures"]
    if unknown := [number for number in architectures if number not in known]:
        raise ValueError(f"expected architectures out of {known}, got {unknown}; add them to aot.toml")
    return {
        **config,
        "architectures": list(architectures),
        "ptx": config["ptx"] if config["ptx"] in architectures else None,
    }


def _images(
    specification: Specification, images: Sequence[CompiledImage], ptx: int | None
) -> Iterator[tuple[str, bytes, CompiledImage, bool]]:
    """Each image's file name and content, and whether it is PTX."""
    for image in images:
        yield f"{specification.symbol}.sm_{image.architecture}.cubin", image.cubin, image, False
    for image in images:
        if image.architecture == ptx:
            yield f"{specification.symbol}.compute_{ptx}.ptx", image.ptx.encode() + b"\0", image, True


def _label(name: str) -> str:
    return "image_" + name.replace(".", "_")


def _embedded(name: str) -> str:
    label = _label(name)
    # the driver reads an image's header as numbers of 8 bytes
    return f'.section .rodata\n.balign 16\n.global {label}\n.hidden {label}\n{label}:\n.incbin "images/{name}"\n'


def _prototype(specification: Specification) -> str:
    arguments = "".join(
        f", {'const void *' if parameter.type.startswith('*') else _C_TYPES[parameter.type] + ' '}{parameter.name}"
        for parameter in specification.parameters
    )
    return (
        f"int {specification.symbol}(int device, void *stream, unsigned grid_x, unsigned grid_y, unsigned grid_z"
        f"{arguments})"
    )


def _table(specification: Specification, entry: str, files: Sequence[tuple[str, bytes, CompiledImage, bool]]) -> str:
    """A kernel's images and its launch function, in C."""
    name = specification.symbol
    images = "".join(
        f"    {{{image.architecture}, {int(is_ptx)}, {int(image.architecture >= EXACT_FROM)}, "
        f"{image.shared_bytes}, {_label(file)}}},\n"
        for file, _, image, is_ptx in files
    )
    declared = "".join(f"extern const unsigned char {_label(file)}[];\n" for file, *_ in files)
    arguments = ", ".join(f"(void *)&{parameter.name}" for parameter in specification.parameters)
    hidden = ", ".join(["&none"] * HIDDEN_PARAMETERS)
    return (
        f"{declared}static const fastcache_image {name}_images[] = {{\n{images}}};\n"
        f'static fastcache_kernel {name}_kernel = {{"{entry}", {specification.num_warps * WARP_SIZE}, '
        f"{len(files)}, {name}_images, {{0}}, {{0}}}};\n"
        f"{_prototype(specification)} {{\n"
        f"    void *none = 0;\n"
        f"    void *arguments[] = {{{arguments}, {hidden}}};\n"
        f"    return fastcache_launch(&{name}_kernel, device, stream, grid_x, grid_y, grid_z, arguments);\n}}\n\n"
    )


def _header(listed: Sequence[Specification]) -> str:
    lines = "".join(f"FASTCACHE_EXPORT {_prototype(specification)};\n" for specification in listed)
    return (
        "/* Written by fastcache_kernels/aot.py. Each function launches a kernel on a device, in a stream of its\n"
        " * primary context, and returns 0 or a code for fastcache_error. With a grid_x of 0 it is only loaded. */\n"
        "#ifndef FASTCACHE_KERNELS_H\n#define FASTCACHE_KERNELS_H\n\n"
        '#include "aot_launch.h"\n\n'
        "/* The hash of the Triton sources that these kernels were compiled from. */\n"
        f"FASTCACHE_EXPORT const char *fastcache_source_sha256(void);\n\n{lines}\n#endif\n"
    )


def _source(tables: Sequence[str]) -> str:
    return (
        '#include "fastcache_kernels.h"\n\n'
        f'const char *fastcache_source_sha256(void) {{ return "{source_hash()}"; }}\n\n' + "".join(tables)
    )


def _manifest(config: Mapping[str, Any], compiled: Mapping[Specification, Sequence[CompiledImage]]) -> dict[str, Any]:
    import triton

    return {
        "schema": 1,
        "source_sha256": source_hash(),
        "library": LIBRARY,
        "triton": triton.__version__,
        "architectures": config["architectures"],
        "ptx": config["ptx"],
        "kernels": [
            {
                "symbol": specification.symbol,
                "kernel": specification.kernel,
                "constants": dict(specification.constants),
                "num_warps": specification.num_warps,
                "parameters": [
                    {"name": parameter.name, "type": parameter.type, "aligned": parameter.aligned}
                    for parameter in specification.parameters
                ],
                "shared_bytes": {str(image.architecture): image.shared_bytes for image in images},
            }
            for specification, images in compiled.items()
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcache_kernels.aot", description=__doc__)
    parser.add_argument("config", type=Path, help="aot.toml")
    parser.add_argument("folder", type=Path, help="where the library's sources go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--architectures", default="", help="only these of aot.toml's, as 89,90")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.pop("TRITON_INTERPRET", None)
    # what is compiled must not depend on what this user compiled before, nor name this machine's folders
    os.environ["TRITON_CACHE_DIR"] = str(options.folder.resolve() / "triton-cache")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    config = tomllib.loads(options.config.read_text(encoding="utf-8"))
    if options.architectures:
        config = only(config, [int(number) for number in options.architectures.split(",")])
    build(config, options.folder, options.jobs)


if __name__ == "__main__":
    main()
