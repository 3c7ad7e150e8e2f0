"""Every backend, on every device and in every dtype, against the same model: one suite, one reason for each skip."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

import fastcache
import fastcache_engines
from build_store import BuildStore
from fastcache import Bundle
from fastcache.bundle.parity import TOLERANCE, relative_error
from fastcache.errors import BackendUnavailable
from fastcache.evaluate.quality import psnr_db
from fastcache_engines import LoadOptions

Case = tuple[str, str, str]
Engines = tuple[Any, Any, dict[str, Tensor]]
CASES: list[Case] = [
    (name, device, dtype)
    for name in fastcache_engines.BACKENDS
    for device, dtypes in fastcache_engines.backend(name).CAPABILITIES.dtypes.items()
    for dtype in dtypes
]
PSNR_DB = {"fp32": 60.0, "fp16": 40.0, "bf16": 30.0}  # of random weights, which forgive less than trained ones


# A bundle takes half a minute to build, two with AOTInductor's C++ compiler: one for each quick backend is enough.
QUICK = {"onnxruntime": "fp32", "tensorrt": "fp16"}
COMPILED = [pytest.param(case, marks=[pytest.mark.slow] * (QUICK.get(case[0]) != case[2])) for case in CASES]


@pytest.fixture(scope="module", params=COMPILED, ids="-".join)
def bundle(request: pytest.FixtureRequest, tiny_model: Path, builds: BuildStore) -> Bundle:
    """The tiny model built for one backend, device and dtype."""
    name, device, dtype = request.param
    support = fastcache_engines.backend(name).support(device)
    if not support.can_build:
        pytest.skip(f"{name} on {device}: {support.reason}")
    return builds.bundle(tiny_model, backend=name, device=device, dtype=dtype)


@pytest.fixture
def engines(bundle: Bundle) -> Engines:
    """The full and the shallow engine, and the reference's inputs and outputs on the engines' device."""
    manifest = bundle.manifest
    backend = fastcache_engines.backend(manifest.backend)
    support = backend.support(manifest.device_type)
    if not support.can_run:
        pytest.skip(f"{manifest.backend} on {manifest.device_type}: {support.reason}")
    options = LoadOptions(manifest.device_type, manifest.engines["full"].dtype)
    full, shallow = (backend.load(bundle.engine_path(role), options) for role in ("full", "shallow-0"))
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in (*full.inputs, *full.outputs)}
    reference = load_file(bundle.file("reference.safetensors"))
    return full, shallow, {name: reference[name].to(manifest.device_type, dtype) for name, dtype in dtypes.items()}


def test_the_manifest_tells_the_parity_that_was_measured(bundle: Bundle) -> None:
    manifest = bundle.manifest
    support = fastcache_engines.backend(manifest.backend).support(manifest.device_type)
    substitute = "torch" if manifest.dtype == "bf16" else "onnxruntime"
    parity = manifest.parity
    assert parity.measured_on == (manifest.backend if support.can_run else substitute)
    assert parity.tolerance == TOLERANCE[manifest.dtype]
    assert 0 < parity.full_vs_model <= parity.tolerance  # exactly 0 would mean that nothing was compared
    assert 0 <= parity.shallow_vs_full <= parity.tolerance


def test_engines_are_what_the_manifest_says(bundle: Bundle, engines: Engines) -> None:
    for role, engine in zip(("full", "shallow-0"), engines, strict=False):
        entry = bundle.manifest.engines[role]
        assert [(s.name, s.dtype, s.shape[1:]) for s in engine.inputs] == [
            (s.name, s.dtype, s.shape[1:]) for s in entry.inputs
        ]
        assert [(s.name, s.dtype, s.shape[1:]) for s in engine.outputs] == [
            (s.name, s.dtype, s.shape[1:]) for s in entry.outputs
        ]


def test_engine_files_are_described_without_being_loaded(bundle: Bundle) -> None:
    describe = fastcache_engines.backend(bundle.manifest.backend).describe
    facts = {role: dataclasses.asdict(describe(bundle.engine_path(role))) for role in bundle.manifest.engines}
    assert set(facts) == {"full", "shallow-0", "text_encoder", "vae_decoder", "vae_encoder"}
    json.dumps(facts)
    assert all(facts.values())
    with pytest.raises(ValueError, match="none"):
        describe(bundle.path / "none.engine")


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_full_and_shallow_share_one_feature_buffer(bundle: Bundle, engines: Engines, rows: int) -> None:
    """Invariants 1, 2 and 5, for every number of rows: a feature written by full is the one that shallow reads."""
    full, shallow, reference = engines
    tensors = {name: value.repeat(2, *[1] * (value.ndim - 1))[:rows].contiguous() for name, value in reference.items()}
    expected = tensors["noise_pred"].clone()
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    bindings = full.bind(tensors), shallow.bind(tensors)
    tolerance = TOLERANCE[bundle.manifest.dtype]
    for _ in range(3):
        tensors["cached_feature"].fill_(torch.nan)
        for binding in bindings:
            tensors["noise_pred"].fill_(torch.nan)
            binding.run()
            assert relative_error(tensors["noise_pred"], expected) <= tolerance
    tensors["cached_feature"].neg_()  # a norm would undo a shift
    bindings[1].run()
    assert relative_error(tensors["noise_pred"], expected) > tolerance
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == places


def test_all_full_is_the_plain_pipeline(bundle: Bundle, engines: Any, tiny_model: Path) -> None:
    """Invariant 3, and that caching moves the picture only so far."""
    plain = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 10, "guidance_scale": 3.0}
    expected = plain("a b", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images
    pipe = fastcache.load(bundle.path)
    own = pipe("a b", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images.cpu()
    assert psnr_db(own, expected) >= PSNR_DB[bundle.manifest.dtype]
    cached = pipe(
        "a b", generator=torch.Generator().manual_seed(0), output_type="pt", cache_interval=2, **arguments
    ).images.cpu()
    assert not torch.equal(cached, own)


def test_engines_that_cannot_run_here_say_so(bundle: Bundle) -> None:
    manifest = bundle.manifest
    support = fastcache_engines.backend(manifest.backend).support(manifest.device_type)
    if support.can_run:
        pytest.skip(f"{manifest.backend} runs here")
    with pytest.raises(BackendUnavailable) as caught:
        fastcache.load(bundle.path)
    assert support.reason in str(caught.value)


@pytest.mark.parametrize(("name", "device", "dtype"), CASES, ids="-".join)
def test_a_backend_that_cannot_build_says_why(name: str, device: str, dtype: str, tmp_path: Path) -> None:
    support = fastcache_engines.backend(name).support(device)
    if support.can_build:
        pytest.skip(f"{name} builds here")
    with pytest.raises(BackendUnavailable) as caught:
        fastcache.build_engines("demo", output=tmp_path / "out", backend=name, device=device, dtype=dtype)
    assert str(caught.value) == f"the backend {name} cannot build here: {support.reason}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", fastcache_engines.BACKENDS)
def test_dtypes_and_devices_that_a_backend_lacks(name: str, tmp_path: Path) -> None:
    devices = fastcache_engines.backend(name).CAPABILITIES.dtypes
    for device in ("cpu", "cuda"):
        for dtype in ("fp32", "fp16", "bf16"):
            if dtype not in devices.get(device, ()):
                with pytest.raises(BackendUnavailable, match=r"^expected (device|dtype) "):
                    fastcache.build_engines("demo", tmp_path / "out", backend=name, device=device, dtype=dtype)


@pytest.mark.parametrize("name", fastcache_engines.BACKENDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_support_never_raises_and_always_says_something(name: str, device: str) -> None:
    support = fastcache_engines.backend(name).support(device)
    assert support.reason
    assert "\n" not in support.reason
    assert support.version is not None or not (support.can_build or support.can_run)


def test_auto_picks_what_is_there_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, first in ((True, "openvino"), (False, "onnxruntime")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        name, reason = fastcache_engines.choose("cpu", "fp32")
        assert name == first
        assert "AVX512-BF16" in reason
    assert fastcache_engines.choose("cpu", "bf16")[0] in ("openvino", "inductor")
    with pytest.raises(BackendUnavailable, match=r"^no backend for fp16 on cpu"):
        fastcache_engines.choose("cpu", "fp16")


def test_openvino_tells_nobody_of_being_used() -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'fastcache-diffusion[openvino]'")
    code = (
        "import sys; from fastcache_engines import openvino; openvino.version(); "
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]; import openvino_telemetry"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_auto_passes_over_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcache_engines import openvino

    def missing() -> Any:
        raise BackendUnavailable("OpenVINO is not installed")

    monkeypatch.setattr(openvino, "_openvino", missing)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    name, reason = fastcache_engines.choose("cpu", "fp32")
    assert name == "onnxruntime"
    assert "passed over: openvino: OpenVINO is not installed" in reason


_AFFINITIES = """
import sys, pathlib, torch
from safetensors.torch import load_file
from fastcache_engines import LoadOptions, openvino
full = openvino.load(pathlib.Path(sys.argv[1]), LoadOptions(threads=1))
values = load_file(sys.argv[2])
names = [spec.name for spec in (*full.inputs, *full.outputs)]
full.bind({name: values[name] for name in names}).run()
for status in pathlib.Path("/proc/self/task").glob("*/status"):
    print(next(line for line in status.read_text().splitlines() if line.startswith("Cpus_allowed_list")))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux, whose /proc names each thread's cores")
def test_openvinos_threads_are_not_pinned_beside_other_programs(tiny_bundle: Bundle) -> None:
    """Two programs of one thread each would otherwise share the first core, and the others would idle."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("needs two cores; here is one")
    files = tiny_bundle.engine_path("full"), tiny_bundle.file("reference.safetensors")
    command = [sys.executable, "-c", _AFFINITIES, *map(str, files)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(set(said.splitlines())) == 1
