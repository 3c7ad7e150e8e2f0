"""AOTInductor's packages compute what eager PyTorch does, on the caller's tensors, from one copy of the weights."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastcache.cut.partition import partition_unet
from fastcache_engines import (
    BackendUnavailable,
    BuildOptions,
    LoadOptions,
    Program,
    Support,
    TensorSpec,
    inductor,
)
from fastcache_engines.inductor import weights as inductor_weights
from inductor_modules import (
    LABELS,
    MOST,
    SIZE,
    TENSORS,
    WEIGHTS,
    assert_close,
    constants_of,
    empty_outputs,
    first_inputs,
    first_module,
    pair,
    program,
    rewrite_package,
)
from small_unets import small_unet

pytestmark = pytest.mark.slow  # a C++ compiler's minutes


@contextlib.contextmanager
def all_output(into: Path) -> Generator[None]:
    """Whatever this process and its children print, also past `sys.stdout`, goes to a file."""
    with tempfile.TemporaryFile() as log:
        saved = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, _ in saved:
                os.dup2(log.fileno(), number)
            yield
        finally:
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
        log.seek(0)
        into.write_bytes(log.read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` and `second` share weights; `twin` has the code of `second` and other weights; `half` is in bfloat16."""
    folder = tmp_path_factory.mktemp("inductor") / "packages"
    folder.mkdir()
    said: list[str] = []
    graphs = pair(first_module())
    graphs["twin"] = pair(first_module(seed=1))["second"]
    half = {"half": pair(first_module(), torch.bfloat16)["first"]}
    with all_output(folder.parent / "printed"):
        names = inductor.build(graphs, folder, BuildOptions(progress=said.append))
        names |= inductor.build(half, folder, BuildOptions(dtype="bf16", progress=said.append))
    assert names == {role: f"{role}.pt2" for role in ("first", "second", "twin", "half")}
    assert said == [f"compiling {role} with AOTInductor" for role in names]
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of the same files, to change: a file is replaced, never written into."""
    for file in folder.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def test_a_build_leaves_packages_and_weights_and_prints_nothing(folder: Path) -> None:
    packages = {"first.pt2", "second.pt2", "twin.pt2", "half.pt2"}
    assert {file.name for file in folder.iterdir()} == packages | {WEIGHTS, "half.weights.safetensors"}
    assert (folder.parent / "printed").read_text() == ""
    (folder.parent / "plain").touch()
    assert (folder / WEIGHTS).stat().st_mode == (folder.parent / "plain").stat().st_mode


def test_what_a_package_takes_and_gives(folder: Path) -> None:
    engine = inductor.load(folder / "first.pt2")
    assert engine.inputs == (
        TensorSpec("image", "float32", ("batch", 4, SIZE, SIZE)),
        TensorSpec("unused", "float32", ("batch", 3)),
        TensorSpec("level", "float32", ("batch",)),
        TensorSpec("label", "int64", ("batch",)),
    )
    assert engine.outputs == (
        TensorSpec("result", "float32", ("batch", 4, SIZE, SIZE)),
        TensorSpec("feature", "float32", ("batch", 32, SIZE, SIZE)),
    )
    half = inductor.load(folder / "half.pt2", LoadOptions(dtype="bf16"))
    assert half.inputs == engine.inputs
    assert [spec.dtype for spec in half.outputs] == ["float32", "bfloat16"]


@pytest.mark.parametrize("batch", [1, 2, 3, MOST])
def test_the_bound_tensors_are_the_ones_read_and_written(folder: Path, batch: int) -> None:
    module, engine = first_module(), inductor.load(folder / "first.pt2")
    tensors = first_inputs(batch) | empty_outputs(engine, batch) | {"other": torch.full((1,), 7.0)}
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    binding = engine.bind(tensors)
    for _ in range(2):
        binding.run()
        result, feature = module({name: tensors[name] for name in first_inputs(1)})
        assert_close(tensors["result"], result, 1e-5)
        assert_close(tensors["feature"], feature, 1e-5)
        tensors["image"].neg_()  # no binding again: the next run reads what is there
        tensors["label"].copy_((tensors["label"] + 1) % LABELS)
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == places
    assert tensors["other"].item() == 7


def test_one_engine_writes_what_the_other_reads(folder: Path) -> None:
    """Invariants 2 and 5: the first engine's output buffer is the second one's input buffer."""
    first, second = (inductor.load(folder / f"{role}.pt2") for role in ("first", "second"))
    tensors = first_inputs(3) | empty_outputs(first, 3)
    again = tensors | {"result": torch.empty_like(tensors["result"])}
    bindings = first.bind(tensors), second.bind(again)
    for binding in bindings:
        binding.run()
    assert_close(again["result"], tensors["result"], 1e-6)
    tensors["feature"].neg_()
    bindings[1].run()
    assert not torch.allclose(again["result"], tensors["result"], rtol=0, atol=1e-2)


def test_equal_code_with_other_weights(folder: Path) -> None:
    """Inductor finds the code of an earlier program among its caches; the weights must be the program's own."""
    module, engine = first_module(seed=1).second, inductor.load(folder / "twin.pt2")
    inputs = {"level": torch.rand(2), "feature": torch.randn(2, 32, SIZE, SIZE)}
    outputs = empty_outputs(engine, 2)
    engine.bind(inputs | outputs).run()
    assert_close(outputs["result"], module(inputs), 1e-5)
    assert not torch.allclose(outputs["result"], first_module().second(inputs), rtol=0, atol=1e-2)


def test_bfloat16(folder: Path) -> None:
    engine = inductor.load(folder / "half.pt2", LoadOptions(dtype="bf16"))
    inputs, outputs = first_inputs(2), empty_outputs(engine, 2)
    engine.bind(inputs | outputs).run()
    for expected in (first_module()(inputs), first_module().to(torch.bfloat16)(inputs)):
        assert_close(outputs["result"], expected[0], 3e-2)  # 8 bits of mantissa: 4e-3 a rounding, some ten in a row
        assert_close(outputs["feature"].float(), expected[1].float(), 1e-2)


def test_tensors_made_in_inference_mode_can_be_bound(folder: Path) -> None:
    engine = inductor.load(folder / "first.pt2")
    with torch.inference_mode():
        tensors = first_inputs(1) | empty_outputs(engine, 1)
    engine.bind(tensors).run()
    assert not tensors["result"].isnan().any()


def test_threads_hold_while_the_engine_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (seen.append(n), set_num_threads(n)))
    for threads in (0, before, before + 1):
        engine = inductor.load(folder / "first.pt2", LoadOptions(threads=threads))
        inputs, outputs = first_inputs(2), empty_outputs(engine, 2)
        engine.bind(inputs | outputs).run()
        assert_close(outputs["result"], first_module()(inputs)[0], 1e-5)
    assert seen == [before + 1, before]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image": None}, "expected a tensor named 'image' to bind, got "),
        ({"result": None}, "expected a tensor named 'result' to bind, got "),
        ({"image": torch.zeros(2, 4, SIZE, SIZE, dtype=torch.float64)}, "expected 'image' .* got float64"),
        ({"image": torch.zeros(2, 4, SIZE, SIZE + 1)}, "expected 'image' .* got float32"),
        ({"label": torch.zeros(2, dtype=torch.int32)}, "expected 'label' .* int64 .* got int32"),
        ({"feature": torch.zeros(3, 32, SIZE, SIZE)}, "expected 'feature' .* got float32"),  # one batch for all
        ({"image": torch.zeros(2, 4, SIZE, SIZE).mT}, "expected 'image' .* got non-contiguous"),
        ({"result": torch.zeros(2, SIZE, SIZE, 4).permute(0, 3, 1, 2)}, "expected 'result' .* got non-contiguous"),
        ({"result": torch.zeros(2, 4, SIZE, SIZE, device="meta")}, "expected 'result' .* on cpu, got .* on meta"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: dict[str, Any], expected: str) -> None:
    engine = inductor.load(folder / "first.pt2")
    tensors = first_inputs(2) | empty_outputs(engine, 2) | change
    with pytest.raises(ValueError, match=expected) as caught:
        engine.bind({name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [0, MOST + 1])
def test_more_rows_than_it_was_compiled_for(folder: Path, rows: int) -> None:
    engine = inductor.load(folder / "first.pt2")
    with pytest.raises(ValueError, match=rf"^expected 1 to {MOST} rows to bind, got {rows}$"):
        engine.bind(first_inputs(rows) | empty_outputs(engine, rows))


def test_equal_weights_are_stored_once(folder: Path) -> None:
    kept = [t for module in (first_module(), first_module(seed=1).second) for t in module.state_dict().values()]
    kept = [tensor for tensor in kept if tensor.numel() > 8]  # inductor writes smaller ones into the code
    distinct = sum({tensor.numpy().tobytes(): tensor.nbytes for tensor in kept}.values())
    stored = load_file(folder / WEIGHTS)
    assert sum(tensor.nbytes for tensor in stored.values()) == distinct
    assert distinct <= (folder / WEIGHTS).stat().st_size < 1.1 * distinct
    for package in ("first.pt2", "second.pt2", "twin.pt2"):
        assert (folder / package).stat().st_size < 2**20


def test_constants_of_every_layout_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 4, 3, 3, generator=generator)
    constants = {
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "again": image.contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5, generator=generator).T,
        "expanded": torch.randn(1, 4, generator=generator).expand(6, 4),
        "part": torch.randn(4, 4, generator=generator).bfloat16()[1:3],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "counts": torch.arange(3),
    }
    store = inductor_weights.Store()
    places = store.add("role", constants)
    package = inductor_weights.Package("", "cpu", "", {}, None, None, (), (), (), places)
    store.write(tmp_path / WEIGHTS, {"role": package})
    assert inductor_weights.find_packages(tmp_path / "role.pt2") == ({"role": package}, tmp_path / WEIGHTS)
    weights = inductor_weights.load_weights(tmp_path / WEIGHTS, torch.device("cpu"))
    found = weights.constants(package)
    for name, tensor in constants.items():
        assert torch.equal(found[name], tensor), name
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride()), name
    assert found["again"].data_ptr() == found["channels last"].data_ptr()


def test_engines_that_are_alive_together_share_their_weights(folder: Path) -> None:
    first, second, other = (inductor.load(folder / f"{role}.pt2") for role in ("first", "second", "half"))
    mine, theirs, others = (constants_of(engine) for engine in (first, second, other))
    assert others["into.weight"].data_ptr() != mine["into.weight"].data_ptr()
    for name, tensor in theirs.items():
        assert mine[f"second.{name}"].data_ptr() == tensor.data_ptr()
        assert tensor.data_ptr() % 64 == 0

    tensors = first_inputs(1) | empty_outputs(first, 1)
    tensors["result"] = torch.empty_like(tensors["result"])
    theirs["out.weight"].zero_()  # nothing was copied: both read what is here now
    for engine in (first, second):
        engine.bind(tensors).run()
        bias = first_module().second.out.get_parameter("bias")
        assert_close(tensors["result"], bias.reshape(1, 4, 1, 1).expand(1, 4, SIZE, SIZE), 1e-6)


def test_weights_live_as_long_as_something_may_read_them(folder: Path) -> None:
    gc.collect()
    first, second = (inductor.load(folder / f"{role}.pt2") for role in ("first", "second"))
    storage = constants_of(first)["into.weight"].untyped_storage()
    size = storage.nbytes()
    inputs = first_inputs(1)
    outputs = empty_outputs(first, 1)
    binding = first.bind(inputs | outputs)
    expected = first_module()(inputs)[0]
    del first
    gc.collect()
    assert storage.nbytes() == size
    del second
    gc.collect()
    binding.run()
    assert_close(outputs["result"], expected, 1e-5)
    del binding
    gc.collect()
    assert storage.nbytes() == 0  # the packages' own references would keep it otherwise
    again = inductor.load(folder / "first.pt2")
    again.bind(inputs | outputs).run()
    assert_close(outputs["result"], expected, 1e-5)


def test_a_binding_keeps_its_tensors_alive(folder: Path) -> None:
    engine = inductor.load(folder / "first.pt2")
    outputs = empty_outputs(engine, 1)
    binding = engine.bind(first_inputs(1) | outputs)
    noise = [torch.full((1, 4, SIZE, SIZE), 9.0) for _ in range(100)]  # would take over the image's memory
    binding.run()
    assert_close(outputs["result"], first_module()(first_inputs(1))[0], 1e-5)
    assert len(noise) == 100


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage" * 1000,
    "cut off": lambda data: data[: len(data) // 2],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_package(copy: Path, damage: str) -> None:
    replace(copy / "first.pt2", DAMAGES[damage]((copy / "first.pt2").read_bytes()))
    with pytest.raises(ValueError, match=r"^AOTInductor cannot load first\.pt2: .+") as caught:
        inductor.load(copy / "first.pt2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(copy: Path, damage: str) -> None:
    replace(copy / WEIGHTS, DAMAGES[damage]((copy / WEIGHTS).read_bytes()))
    with pytest.raises(
        ValueError, match=r"^first\.weights\.safetensors is not a readable file of weights: .+"
    ) as caught:
        inductor.load(copy / "first.pt2")
    assert "\n" not in str(caught.value)


def test_files_that_are_missing(copy: Path) -> None:
    (copy / "first.pt2").unlink()
    with pytest.raises(ValueError, match=r"^AOTInductor cannot load first\.pt2: "):
        inductor.load(copy / "first.pt2")
    (copy / WEIGHTS).unlink()
    with pytest.raises(
        ValueError, match=r"^expected a \*\.weights\.safetensors file beside second\.pt2 .* build again$"
    ):
        inductor.load(copy / "second.pt2")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"torch": "1.0"}, r"^first\.pt2 was built for torch 1\.0, got torch .*; build again on this machine$"),
        ({"device": "cuda"}, r"^first\.pt2 was built for cuda, got cpu to load it on; build for cpu$"),
        (
            {"isa": "avx1024", "features": {"avx": True, "avx1024_f": True}},
            r"^first\.pt2 was built for a processor with avx1024, got one without .*avx1024_f; build again on this m",
        ),
        ({"compute_capability": "9.9"}, r"^first\.pt2 was built for compute capability 9\.9, got None; build again"),
    ],
)
def test_packages_for_another_machine(copy: Path, change: dict[str, Any], expected: str) -> None:
    rewrite_package(copy / WEIGHTS, lambda package: package.update(change))
    with pytest.raises(ValueError, match=expected):
        inductor.load(copy / "first.pt2")


def test_a_package_that_lacks_a_constant(copy: Path) -> None:
    rewrite_package(copy / WEIGHTS, lambda package: package["constants"].pop("into.weight"))
    with pytest.raises(ValueError, match=r"^AOTInductor cannot load first\.pt2: ") as caught:
        inductor.load(copy / "first.pt2")
    assert "\n" not in str(caught.value)


def test_support_on_the_cpu() -> None:
    assert inductor.support("cpu") == Support(torch.__version__, True, True, "ready, on the CPU in fp32 and bf16")


def test_a_torch_that_has_another_loader(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rf"^expected torch 2\.13, .* got {re.escape(torch.__version__)}, which has no torch\._C\._aoti\."
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda path: None)  # of other arguments
    with pytest.raises(BackendUnavailable, match=expected):
        inductor.load(copy / "first.pt2")
    monkeypatch.delattr(torch._C._aoti, "AOTIModelPackageLoader")
    with pytest.raises(BackendUnavailable, match=expected):
        inductor.load(copy / "first.pt2")


@pytest.mark.parametrize("name", ["cpp_builder.get_cpp_compiler", "cpu_vec_isa.pick_vec_isa", "package.package_aoti"])
def test_a_torch_that_has_another_compiler(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pair(first_module())["second"]
    monkeypatch.delattr(f"torch._inductor.{name}")
    with pytest.raises(BackendUnavailable, match=rf"which has no torch\._inductor\.{name} .*; install torch 2\.13"):
        inductor.build({"second": program}, tmp_path, BuildOptions())
    assert not list(tmp_path.iterdir())
    found = inductor.support("cpu")
    assert (found.can_build, found.can_run) == (not name.startswith("cpp_builder"), True)


def test_what_torch_promises_nobody_stands_behind_one_file_each() -> None:
    package = Path(inductor.__file__).parents[1]
    private = {"torch._C": "inductor/loader.py", "torch._inductor": "inductor/compiler.py"}
    for name, file in private.items():
        using = re.compile(rf"^\s*(from|import) {re.escape(name)}\b|import_module\(.*{re.escape(name)}", re.MULTILINE)
        found = [path for path in sorted(package.rglob("*.py")) if using.search(path.read_text(encoding="utf-8"))]
        assert [path.relative_to(package).as_posix() for path in found] == [file]


def test_without_a_compiler_it_runs_but_does_not_build(folder: Path, tmp_path: Path) -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):
        found = inductor.support("cpu")
        assert (found.can_build, found.can_run) == (False, True)
        assert "install g++" in found.reason
        with pytest.raises(BackendUnavailable, match=r"install g\+\+"):
            inductor.build({}, tmp_path, BuildOptions())
        inductor.load(folder / "first.pt2")


def test_a_compiler_that_fails(folder: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo g++ 12; exit 0;; esac\necho "w.cpp:1: error: no luck" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    (tmp_path / "out").mkdir()

    class Add(nn.Module):
        def forward(self, inputs: TENSORS) -> Tensor:
            return inputs["x"] + 1

    graph = program(Add(), {"x": torch.zeros(2, 3)}, "y")
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}),
        all_output(tmp_path / "printed"),
        pytest.raises(ValueError, match=r"^AOTInductor cannot compile the add graph: .*error: no luck$"),
    ):
        inductor.build({"add": graph}, tmp_path / "out", BuildOptions())
    assert not list((tmp_path / "out").iterdir())
    assert (tmp_path / "printed").read_text() == ""


def test_a_program_of_other_names(tmp_path: Path) -> None:
    right = pair(first_module())["second"]
    for wrong in (
        Program(right.exported, ("level", "x"), ("result",)),
        Program(right.exported, right.inputs, ("a", "b")),
    ):
        with pytest.raises(
            ValueError, match=r"^expected the second program to take .*, got one that takes level, feature"
        ):
            inductor.build({"second": wrong}, tmp_path, BuildOptions())


def test_more_rows_than_a_program_allows(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"^expected at most {MOST} rows, as the second program has it, got {MOST + 1}$"
    ):
        inductor.build({"second": pair(first_module())["second"]}, tmp_path, BuildOptions(rows=(1, 2, MOST + 1)))


def test_a_processor_has_no_compute_capability(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^expected to build for the device at hand .*, got 8\.9; .* build on that GPU$"
    ):
        inductor.build({}, tmp_path, BuildOptions(compute_capability=("8.9",)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
def test_without_a_gpu_it_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    found = inductor.support("cuda")
    assert (found.can_build, found.can_run) == (False, False)
    assert "install an NVIDIA driver" in found.reason
    with pytest.raises(BackendUnavailable, match="finds no CUDA GPU"):
        inductor.build({}, tmp_path, BuildOptions(device="cuda"))
    with pytest.raises(BackendUnavailable, match="finds no CUDA GPU"):
        inductor.load(folder / "first.pt2", LoadOptions(device="cuda"))


class UNetPass(nn.Module):
    """A pass of a cut U-Net, called with one dict."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, inputs: TENSORS) -> Any:
        return self.unet(**inputs)


def test_full_and_shallow_of_a_unet(tmp_path: Path) -> None:
    """Invariants 1, 2 and 5, at another batch than the exported one."""
    unet = small_unet("two-blocks", layers_per_block=1)
    cut = partition_unet(unet, 0)

    def make_inputs(batch: int) -> TENSORS:
        torch.manual_seed(batch)
        sample, context = torch.randn(batch, 4, 16, 16), torch.randn(batch, 7, 24)
        return {"sample": sample, "timestep": torch.linspace(981, 1, batch), "encoder_hidden_states": context}

    feature = torch.zeros(2, cut.feature_channels, 16, 16)
    graphs = {
        "full": program(UNetPass(cut.full), make_inputs(2), "noise_pred", "cached_feature"),
        "shallow": program(UNetPass(cut.shallow), make_inputs(2) | {"cached_feature": feature}, "noise_pred"),
    }
    inductor.build(graphs, tmp_path, BuildOptions())
    size = sum(tensor.nbytes for tensor in unet.state_dict().values())
    assert size <= (tmp_path / "full.weights.safetensors").stat().st_size < 1.05 * size

    full, shallow = (inductor.load(tmp_path / f"{role}.pt2") for role in ("full", "shallow"))
    for batch in (1, 2, 3):
        inputs, outputs = make_inputs(batch), empty_outputs(full, batch)
        again = torch.empty_like(outputs["noise_pred"])
        full.bind(inputs | outputs).run()
        shallow.bind(inputs | outputs | {"noise_pred": again}).run()
        assert_close(outputs["noise_pred"], unet(**inputs).sample, 1e-5)
        assert_close(again, outputs["noise_pred"], 1e-5)
