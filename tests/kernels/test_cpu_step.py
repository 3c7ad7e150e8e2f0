"""The loop's compiled C against the plain meaning: every shape, window and guidance, what it leaves alone, refuses."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cpu_library
from fastcache_kernels import cpu_step, reference
from fastcache_kernels.cpu_step import LIBRARY, CpuSteps, Library
from fastcache_kernels.launch import KernelError

SCALES = {"guidance_scale": 7.5, "image_guidance_scale": 1.5}


@pytest.fixture(scope="module")
def library(_shared_folder: Path) -> Library:
    return cpu_library.build(_shared_folder / "cpu-library")


@pytest.fixture
def built(library: Library, _shared_folder: Path) -> Path:
    return _shared_folder / "cpu-library" / "installed" / "fastcache_kernels" / LIBRARY


@dataclass(frozen=True)
class Case:
    """One U-Net call of a run: sizes, and how far its update looks back."""

    images: int = 2
    channels: int = 4
    plane: tuple[int, ...] = (8, 8)
    further: int = 0
    halves: int = 2
    call: int = 2
    window: int = 2
    spare: int = 0
    rescale: float = 0.0
    mean: float = 0.0
    contrasts: bool = False
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    call = draw(st.integers(0, 6))
    side = st.integers(1, 40)
    return Case(
        images=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 5)),
        plane=draw(st.tuples(side, side) | st.tuples(st.integers(2, 5000))),
        further=draw(st.integers(0, 3)),
        halves=draw(st.integers(1, 3)),
        call=call,
        window=draw(st.integers(1, min(5, call + 1))),
        spare=draw(st.integers(0, 2)),
        rescale=draw(st.sampled_from((0.0, 0.3, 0.7, 1.0))),
        mean=draw(st.sampled_from((0.0, 1.0, 30.0))),
        contrasts=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


class Call:
    """A call's buffers, filled, with its two functions made, and what both should leave."""

    def __init__(self, library: Library, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        self.case, self.shape = case, (case.images, case.channels, *case.plane)
        places = case.window + case.spare
        self.ring = torch.randn(places, 3, *self.shape, generator=generator)
        self.weights = torch.randn(3 * case.window, generator=generator).tolist()
        rows = case.halves * case.images
        self.noise_pred = torch.randn(rows, *self.shape[1:], generator=generator) + case.mean
        self.sample = torch.full((rows, case.channels + case.further, *case.plane), torch.nan)
        self.timestep = torch.full((rows,), torch.nan)
        first = case.call + 1 - case.window
        updates = [(i, [0.0] * 3) for i in range(case.call)] + [(first, self.weights)]
        self.steps = CpuSteps(
            library,
            self.ring,
            updates,
            input_scales=[9.0] * case.call + [0.9],
            timesteps=[9.0] * case.call + [741.5],
            rescale=case.rescale,
            contrasts=case.contrasts,
            **SCALES,
        )
        own = self.steps.rows(self.sample, self.timestep, self.noise_pred)
        self.begin, self.end = self.steps.calls(case.call, own)

    def place(self, call: int) -> Tensor:
        return self.ring[call % len(self.ring)]

    def expected_guided(self) -> Tensor:
        """In float64."""
        parts, out = self.noise_pred.double().split(self.case.images), torch.empty(self.shape, dtype=torch.float64)
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:
            reference.guide(*parts, SCALES["guidance_scale"], self.case.rescale, out)
            return out
        of_image, of_text = parts[1] - parts[0], parts[2] - parts[1]
        return parts[0] + SCALES["image_guidance_scale"] * of_image + SCALES["guidance_scale"] * of_text

    def expected_contrast(self) -> Tensor:
        halves = self.noise_pred.double().unflatten(0, (-1, self.case.images))
        return halves[-1] - halves[-2] if len(halves) > 1 else torch.zeros_like(halves[0])

    def expected_latents(self, guided: Tensor) -> Tensor:
        """In float64, out of the ring as it is before the call's end."""
        case = self.case
        calls = range(case.call + 1 - case.window, case.call + 1)
        rows = torch.cat([self.place(i) for i in calls]).double()
        rows[-2] = guided
        if case.contrasts:
            rows[-1] = self.expected_contrast()
        out = torch.empty(1, rows[0].numel(), dtype=torch.float64)
        reference.combine(rows.flatten(1), torch.tensor([self.weights], dtype=torch.float64), out)
        return out.view(self.shape)


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((got.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@given(case=cases())
def test_an_end_is_guidance_and_the_update(library: Library, case: Case) -> None:
    if case.halves == 2 and case.rescale and case.channels * torch.Size(case.plane).numel() < 2:
        case = replace(case, rescale=0.0)  # one number has no deviation
    call = Call(library, case)
    guided = call.expected_guided()
    latents, before = call.expected_latents(guided), call.ring.clone()
    call.end()
    # guidance takes the difference of two halves 7.5 times, and theirs are of the size of their mean
    assert_near(call.place(case.call)[1], guided, 3e-6)
    terms = 3 * case.window * max(map(abs, call.weights)) * float(before.abs().max() + guided.abs().max())
    assert float((call.place(case.call + 1)[0].double() - latents).abs().max()) <= 1e-6 * terms
    kept = torch.ones(len(call.ring), 3, dtype=torch.bool)
    kept[case.call % len(call.ring), 1] = kept[(case.call + 1) % len(call.ring), 0] = False
    if case.contrasts:
        assert_near(call.place(case.call)[2], call.expected_contrast(), 1e-6)
        kept[case.call % len(call.ring), 2] = False
    assert torch.equal(call.ring[kept], before[kept])


@given(case=cases())
def test_a_beginning_is_the_scaled_latents_for_each_half(library: Library, case: Case) -> None:
    call = Call(library, case)
    before, latents = call.ring.clone(), call.place(case.call)[0]
    call.begin()
    inputs = call.sample.unflatten(0, (case.halves, case.images))
    expected = torch.empty_like(inputs[:, :, : case.channels])
    reference.duplicate(latents.expand_as(expected), torch.tensor(0.9), expected)
    assert torch.equal(inputs[:, :, : case.channels], expected)
    assert inputs[:, :, case.channels :].isnan().all()
    assert call.timestep.tolist() == [741.5] * len(call.timestep)
    assert torch.equal(call.ring, before)


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("size", [64, 1024, 1025, 16384])
def test_a_rescaled_prediction_varies_as_its_conditional_half(library: Library, size: int, mean: float) -> None:
    """Around a mean far from 0 too: a variance out of a sum of squares loses (mean / deviation)^2 of its digits."""
    call = Call(library, Case(images=1, channels=1, plane=(size,), rescale=1.0, mean=mean))
    call.end()
    got, wanted = call.place(2)[1].double().std(), call.noise_pred[1].double().std()
    assert float(got / wanted) == pytest.approx(1, abs=1e-5)


def test_rows_that_count_nothing_are_not_read(library: Library) -> None:
    call = Call(library, Case(window=2))
    call.weights[0] = call.weights[2] = 0.0
    call.ring[1, 0] = call.ring[1, 2] = torch.nan  # x and z of call 1
    steps = CpuSteps(
        library, call.ring, [(0, [0.0] * 3), (0, [0.0] * 6), (1, call.weights)], input_scales=[1] * 3, timesteps=[1] * 3
    )
    _, end = steps.calls(2, steps.rows(call.sample, call.timestep, call.noise_pred))
    end()
    assert call.place(3)[0].isfinite().all()


def test_a_calls_memory_lives_as_long_as_the_call(library: Library) -> None:
    begin, end = (lambda call: (call.begin, call.end))(Call(library, Case(plane=(300, 300))))
    for _ in range(20):
        torch.randn(2, 4, 300, 300)  # would take what was given back
        begin()
        end()


def test_what_does_not_fit_is_refused(library: Library) -> None:
    call = Call(library, Case())
    numbers = {"input_scales": [1.0] * 3, "timesteps": [1.0] * 3}
    with pytest.raises(ValueError, match="expected a ring of 3 calls or more"):
        CpuSteps(library, call.ring, [(0, [1.0] * 3), (0, [1.0] * 6), (0, [1.0] * 9)], **numbers)
    with pytest.raises(ValueError, match="ring"):
        CpuSteps(library, call.ring.half(), [(0, [1.0] * 3)], **numbers)
    with pytest.raises(ValueError, match=r"expected 1 to 3 rows for each of 2 images .* got 8 rows"):
        call.steps.rows(call.sample, call.timestep, torch.cat([call.noise_pred] * 2))
    for tensors, name in (
        ((call.sample.half(), call.timestep, call.noise_pred), "sample"),
        ((call.sample, call.timestep[:3], call.noise_pred), "timestep"),
        ((call.sample, call.timestep, call.noise_pred.transpose(2, 3)), "noise_pred"),
    ):
        with pytest.raises(ValueError, match=name):
            call.steps.rows(*tensors)


def test_a_library_of_another_source_is_not_used(built: Path, tmp_path: Path) -> None:
    stamp = cpu_step.source_hash().encode()
    (tmp_path / LIBRARY).write_bytes(built.read_bytes().replace(stamp, stamp[::-1]))
    with pytest.raises(KernelError, match=r"of another cpu_step\.c than the one installed; install again"):
        Library(tmp_path)


def test_a_library_that_does_not_load_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        KernelError, match=r"no libfastcache_cpu\.so in fastcache_kernels; install again with CMake and a C compiler"
    ):
        Library(tmp_path)
    (tmp_path / LIBRARY).write_bytes(b"no library")
    with pytest.raises(KernelError, match="does not load"):
        Library(tmp_path)


def test_what_a_loop_on_the_cpu_uses(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(built, tmp_path)
    try:
        for folder, expected in ((tmp_path, "aot"), (tmp_path / "none", "torch")):
            monkeypatch.setattr("fastcache_kernels.__path__", [str(folder)])
            cpu_step.found_library.cache_clear()
            which, why = cpu_step.source()
            assert which == expected
            assert ("one call before each engine" if which == "aot" else "install again with CMake") in why
    finally:
        cpu_step.found_library.cache_clear()
