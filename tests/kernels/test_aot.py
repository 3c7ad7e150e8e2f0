"""CMake builds the ahead-of-time library for real, without a GPU: symbols, architectures, parameters, and the wheel."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcache_kernels import aot, cpu_step, guidance
from fastcache_kernels.launch import GpuLibrary
from fastcache_kernels.manifest import KERNELS, LIBRARY, MANIFEST, SOURCE, has_image, source_hash
from fastcache_kernels.values import step_tables

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tomllib.loads((ROOT / "kernels" / "aot.toml").read_text(encoding="utf-8"))
LACKING = [name for name in ("cmake", "cc", "nm") if shutil.which(name) is None]
needs_tools = pytest.mark.skipif(
    bool(LACKING) or importlib.util.find_spec("triton") is None,
    reason=f"needs triton and {', '.join(LACKING) or 'a C compiler'}; run: pip install triton",
)
PTX_TYPES = {"i32": ".u32", "fp32": ".f32"}


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(word) for word in command],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder; what it installs lies in `installed/fastcache_kernels`."""
    folder = tmp_path_factory.mktemp("aot")
    run("cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", "-DFASTCACHE_AOT_JOBS=2")
    run("cmake", "--build", folder)
    run("cmake", "--install", folder, "--prefix", folder / "installed")
    return folder


@pytest.fixture
def installed(build: Path) -> Path:
    return build / "installed" / "fastcache_kernels"


@pytest.fixture
def manifest(installed: Path) -> dict[str, Any]:
    return json.loads((installed / MANIFEST).read_text(encoding="utf-8"))


def recorded(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[tuple[Any, ...]]:
    """What `work` would launch: kernel, arguments, warps, constants."""
    launches: list[tuple[Any, ...]] = []

    def prepare(kernel: str, grid: Any, arguments: Mapping[str, Any], *, num_warps: int, **constants: int) -> None:
        launches.append((kernel, arguments, num_warps, constants))

    monkeypatch.setattr(guidance, "prepare", prepare)
    work()
    return launches


def step_on(
    noise_pred: torch.Tensor, ring: torch.Tensor, noise: torch.Tensor | None = None, rescale: float = 0.7
) -> guidance.GuidanceStep:
    """One step of six of a sampler that looks back as far as its ring goes."""
    calls = len(ring)
    tables = step_tables(
        [(max(0, i + 1 - calls), [1.0] * 3 * min(i + 1, calls)) for i in range(6)],
        input_scales=[1] * 6,
        timesteps=[1] * 6,
        guidance=2.0,
        device=ring.device,
    )
    step = torch.zeros(1, dtype=torch.int32, device=ring.device)
    timestep = torch.zeros(2, device=ring.device)
    return guidance.GuidanceStep(
        noise_pred, ring, tables, step, torch.zeros_like(noise_pred), timestep, rescale=rescale, noise=noise
    )


def everything(dtype: torch.dtype) -> None:
    """Every kind of launch there is, at the size of SD 1.5's latents."""
    for calls in (1, 5):
        for noise in (None, torch.zeros(6, 1, 4, 64, 64)):
            step_on(torch.zeros(2, 4, 64, 64, dtype=dtype), torch.zeros(calls, 3, 1, 4, 64, 64), noise)


@pytest.mark.slow
@needs_tools
def test_symbols(installed: Path, manifest: dict[str, Any]) -> None:
    """One launch function a kernel and nothing else; no CUDA library is linked to."""
    defined = {line.split()[-1] for line in run("nm", "-D", "--defined-only", installed / LIBRARY).splitlines()}
    assert defined == {entry["symbol"] for entry in manifest["kernels"]} | {
        "fastcache_error",
        "fastcache_source_sha256",
    }
    undefined = {line.split()[-1] for line in run("nm", "-D", "--undefined-only", installed / LIBRARY).splitlines()}
    assert not [name for name in undefined if name.startswith("cu")]
    header = (installed / "fastcache_kernels.h").read_text(encoding="utf-8")
    assert all(f"int {entry['symbol']}(int device, void *stream" in header for entry in manifest["kernels"])


@pytest.mark.slow
@needs_tools
def test_every_kernel_for_every_architecture(build: Path, installed: Path, manifest: dict[str, Any]) -> None:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = (installed / LIBRARY).read_bytes()
    assert manifest["architectures"] == CONFIG["architectures"] == [80, 86, 89, 90, 100, 120]
    images = build / "aot" / "images"
    assert len(list(images.iterdir())) == len(manifest["kernels"]) * 7
    for entry in manifest["kernels"]:
        ptx = (images / f"{entry['symbol']}.compute_89.ptx").read_bytes()
        assert b".target sm_89\n" in ptx  # sm_90a's would not run on what comes after
        assert ptx in library
        for number in manifest["architectures"]:
            assert (images / f"{entry['symbol']}.sm_{number}.cubin").read_bytes() in library
    first = manifest["kernels"][0]["symbol"]
    for number in manifest["architectures"]:
        dumped = run(cuobjdump, "-elf", images / f"{first}.sm_{number}.cubin")
        assert re.search(rf"\bsm[=_]{number}a?\b|EF_CUDA_SM{number}\b", dumped), dumped[:1000]


@pytest.mark.slow
@needs_tools
def test_launch_parameters_are_those_of_the_sources(build: Path, manifest: dict[str, Any]) -> None:
    """Names as in the Triton functions, types as in the machine code, and shared memory within what needs no asking."""
    assert manifest["source_sha256"] == source_hash()
    assert {entry["kernel"] for entry in manifest["kernels"]} == set(KERNELS)
    for entry in manifest["kernels"]:
        function = getattr(importlib.import_module(f"fastcache_kernels.{SOURCE}"), entry["kernel"])
        names = [parameter["name"] for parameter in entry["parameters"]]
        assert names + list(entry["constants"]) == function.arg_names
        ptx = (build / "aot" / "images" / f"{entry['symbol']}.compute_89.ptx").read_text(encoding="utf-8")
        parameters = re.findall(r"\.param (\.\w+)", ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))])
        expected = [PTX_TYPES.get(parameter["type"], ".u64") for parameter in entry["parameters"]]
        assert parameters == [*expected, ".u64", ".u64"]  # Triton's own two at the end
        assert f".reqntid {32 * entry['num_warps']}\n" in ptx
        assert max(entry["shared_bytes"].values()) <= 49152


@pytest.mark.slow
@needs_tools
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_what_is_launched_is_there(dtype: torch.dtype, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = GpuLibrary(installed)
    launches = recorded(monkeypatch, lambda: everything(dtype))
    assert {kernel for kernel, *_ in launches} == set(KERNELS)
    assert [kernel for kernel, *rest in launches if library.find(kernel, *rest) is None] == []


@pytest.mark.slow
@needs_tools
def test_what_is_not_there_is_not_found(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes of an odd size, and tensors that begin anywhere, would be read past what a load may touch."""
    library = GpuLibrary(installed)

    def odd() -> None:
        for noise_pred in (torch.zeros(2, 4, 5, 7), torch.zeros(2 * 4 * 64 + 1)[1:].view(2, 4, 8, 8)):
            step_on(noise_pred, torch.zeros(1, 3, 1, *noise_pred.shape[1:]), rescale=0.0)

    launches = recorded(monkeypatch, odd)
    assert len(launches) == 2
    assert [kernel for kernel, *rest in launches if library.find(kernel, *rest) is not None] == []


@pytest.mark.slow
@needs_tools
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without an NVIDIA driver")
def test_a_launch_without_a_driver_says_so(installed: Path, manifest: dict[str, Any]) -> None:
    library = ctypes.CDLL(str(installed / LIBRARY))
    library.fastcache_error.restype = ctypes.c_char_p
    code = library[manifest["kernels"][0]["symbol"]](0, None, 1, 1, 1)
    assert code < 0
    assert b"libcuda.so.1" in library.fastcache_error(code)
    assert b"below 64" in library.fastcache_error(library[manifest["kernels"][0]["symbol"]](64, None, 1, 1, 1))


NO_IMAGE = "-2 expected a GPU of compute capability 8.0 or newer, got an older one"
DRIVE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
function = library.fastcache_guidance_statistics_fp16_1024
library.fastcache_error.restype = ctypes.c_char_p
def launch(device, stream, *grid):
    unsigned, address = ctypes.c_uint, ctypes.c_void_p
    code = function(device, address(stream), *map(unsigned, grid), *map(address, (1 << 40, 2, 3, 4)), 5, 6)
    print(code, library.fastcache_error(code).decode(), flush=True)
launch(0, 9, 0, 0, 0)
launch(0, 9, 64, 2, 1)
launch(1, 9, 64, 2, 1)
"""


@pytest.mark.slow
@needs_tools
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for the driver is for where there is none")
@pytest.mark.parametrize(
    ("capability", "old", "loads"),
    [
        ("80", False, ["load cubin 80"]),
        ("87", False, ["load cubin 86"]),
        ("89", False, ["load cubin 89"]),
        ("90", False, ["load cubin 90"]),
        ("90", True, ["refuse", "load ptx 89"]),
        ("100", False, ["load cubin 100"]),
        ("103", False, ["load ptx 89"]),  # sm_100a's cubin runs on sm_100 only
        ("121", False, ["load ptx 89"]),
        ("80", True, ["refuse"]),
        ("75", False, []),
    ],
)
def test_which_image_is_loaded_and_how_it_is_launched(
    capability: str, old: bool, loads: list[str], installed: Path, tmp_path: Path
) -> None:
    """Against a stand-in for the CUDA driver that tells what it is asked for."""
    run("cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", Path(__file__).with_name("stand_in_cuda.c"))
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "STAND_IN_CAPABILITY": capability}
    environment |= {"STAND_IN_OLD": "1"} if old else {}
    said = run(sys.executable, "-c", DRIVE, installed / LIBRARY, **environment).splitlines()
    *said, other_device = said
    assert other_device == "101 invalid device ordinal"
    if loads and loads[-1] != "refuse":
        launch = f"launch grid 64 2 1 threads 128 1 1 stream 9 {1 << 40} 2 3 4 5 6 0 0"
        once = ["push", *loads, "function guidance_statistics", "pop", "0 no error"]
        assert said == ["retain", *once, "push", launch, "pop", "0 no error"]
    else:
        error = "222 unknown error of the CUDA driver" if loads else NO_IMAGE
        assert said == ["retain", *["push", *loads, "pop", error] * 2]


@pytest.mark.slow
@needs_tools
def test_no_folder_of_this_machine_is_in_the_library(build: Path, installed: Path) -> None:
    for file in installed.iterdir():
        content = file.read_bytes()
        assert str(ROOT).encode() not in content
        assert str(build).encode() not in content


@pytest.mark.slow
@needs_tools
@pytest.mark.gpu
def test_ahead_of_time_kernels_give_what_triton_gives(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcache_kernels import launch

    device = torch.device("cuda:0")
    generator = torch.Generator().manual_seed(0)
    noise_pred = torch.randn(2, 4, 64, 64, generator=generator).half().to(device)
    start, results = torch.randn(1, 3, 1, 4, 64, 64, generator=generator).to(device), []
    for found in (GpuLibrary(installed), launch.KernelError("not to be used")):
        monkeypatch.setattr(launch, "_found_library", lambda found=found: found)
        ring = start.clone()
        step_on(noise_pred, ring).run()
        results.append(ring)
    torch.testing.assert_close(*results)


@pytest.mark.slow
@needs_tools
@pytest.mark.skipif(importlib.util.find_spec("scikit_build_core") is None, reason="needs scikit-build-core")
def test_a_wheel_carries_the_library_where_it_is_asked_to(tmp_path: Path) -> None:
    """For one architecture, for the sake of time; and as that is one whose PTX nobody else reads, without any."""
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT),
        FASTCACHE_AOT="1",
        SKBUILD_CMAKE_DEFINE="FASTCACHE_AOT_ARCHITECTURES=90;FASTCACHE_AOT_JOBS=2",
    )
    (wheel,) = tmp_path.glob("fastcache_diffusion-*.whl")
    assert re.search(r"-py3-none-(linux|manylinux)_", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    library = GpuLibrary(tmp_path / "wheel" / "fastcache_kernels")
    assert (library.manifest["architectures"], library.manifest["ptx"]) == ([90], None)
    assert len(library.variants) == len(list(aot.specifications(CONFIG)))
    cpu_step.Library(tmp_path / "wheel" / "fastcache_kernels")
    assert (tmp_path / "wheel" / "fastcache_kernels" / cpu_step.SOURCE).is_file()  # what the library is held against


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("cc")), reason="needs cmake and a C compiler")
@pytest.mark.skipif(importlib.util.find_spec("scikit_build_core") is None, reason="needs scikit-build-core")
@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_a_plain_wheel_is_built_with_a_compiler_and_without(compiler: str, tmp_path: Path) -> None:
    """The loop's C, and nothing for GPUs; or Python alone."""
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    run(*build, CC=compiler)
    (wheel,) = tmp_path.glob("fastcache_diffusion-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert libraries == ([f"fastcache_kernels/{cpu_step.LIBRARY}"] if compiler == "cc" else [])
    assert wheel.name.endswith("-any.whl") == (compiler != "cc")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "none"}, "expected a kernel out of guidance_statistics, .* got 'none'"),
        ({"parameters": {"size": "i64"}}, "expected size to be an address .* got 'i64'"),
        ({"parameters": {"size": "i32:8"}}, "got 'i32:8'"),
    ],
)
def test_a_config_that_does_not_fit(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        list(aot.specifications({"kernel": [CONFIG["kernel"][0] | change]}))


@needs_tools
def test_parameters_that_are_not_the_kernels_are_refused() -> None:
    table = CONFIG["kernel"][0]
    wrong = table | {"parameters": {"ring": "*fp32"}}
    with pytest.raises(
        ValueError, match=r"expected the parameters of guidance_statistics, noise_pred, .* got ring, BLOCK"
    ):
        aot.compile_kernel(next(aot.specifications({"kernel": [wrong]})), 80)


@pytest.mark.parametrize(
    ("architectures", "ptx", "served"),
    [
        ([90], None, {75: False, 89: False, 90: True, 103: False}),
        ([89], 89, {75: False, 86: False, 89: True, 90: True, 121: True}),
        ([80, 90], None, {80: True, 87: True, 75: False, 90: True, 100: False}),
    ],
)
def test_some_architectures_alone(architectures: list[int], ptx: int | None, served: dict[int, bool]) -> None:
    chosen = aot.only(CONFIG, architectures)
    assert (chosen["architectures"], chosen["ptx"]) == (architectures, ptx)
    assert {number: has_image(number, architectures, ptx) for number in served} == served
    with pytest.raises(ValueError, match=r"expected architectures out of \[80, .*, got \[91\]; add them"):
        aot.only(CONFIG, [*architectures, 91])


def test_ptx_that_newer_gpus_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected ptx to be one of architectures below 90, got 90"):
        aot.build(CONFIG | {"ptx": 90}, tmp_path, 1)
