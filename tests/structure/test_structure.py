"""The rules of the house that no linter holds: lazy imports, a README that runs, quiet library code."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from build_store import BuildStore

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PACKAGES = (
    ROOT / "fastcache",
    ROOT / "engines" / "fastcache_engines",
    ROOT / "kernels" / "fastcache_kernels",
)
HEAVY = (
    "DeepCache",
    "cryptography",
    "diffusers",
    "fastapi",
    "matplotlib",
    "onnxruntime",
    "openvino",
    "ray",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "transformers",
    "triton",
)
BUILDING = ("diffusers", "transformers", "torch._dynamo", "scipy", "onnxscript", "fastcache.compile")
PUBLIC = (
    "BackendUnavailable",
    "BuildError",
    "BundleError",
    "CachePlan",
    "PartitionError",
    "build_engines",
    "compile_sampler",
    "load",
    "partition_unet",
)
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?fastcache\s")


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown text; `line` is that of its first line of content, from 1."""

    language: str
    text: str
    line: int


def fenced_blocks(markdown: str) -> list[Block]:
    return [
        Block(match[1], match[2], markdown.count("\n", 0, match.start(2)) + 1) for match in FENCE.finditer(markdown)
    ]


def shell_commands(text: str) -> Iterator[str]:
    """The fastcache commands of a console or sh block; where lines begin with `$`, the others are output."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in prompted or lines:
        if COMMAND.match(line):
            yield line.removeprefix(".venv/bin/")


def as_script(blocks: list[Block]) -> str:
    """One Python program that does what a reader of the blocks would do, in their order."""
    script = ["import subprocess", "namespace = {'__name__': '__main__'}"]
    for block in blocks:
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # tracebacks then name the README's own lines
            script.append(f"exec(compile({source!r}, {str(README)!r}, 'exec'), namespace)")
        elif block.language in ("console", "sh"):
            script += [
                f"subprocess.run(['bash', '-c', {command!r}], check=True)" for command in shell_commands(block.text)
            ]
    return "\n".join(script)


def python_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]


def outspoken_lines(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that print, exit or assert: library code raises or returns instead."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "exit", "quit", "sys.exit", "os._exit"):
                yield node.lineno, name


def test_import_is_lazy():
    script = (
        "import json, sys\n"
        "import fastcache\n"
        f"missing = [name for name in {PUBLIC!r} if name not in dir(fastcache)]\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps({'missing': missing, 'loaded': loaded}))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"missing": [], "loaded": []}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name: str):
    import fastcache

    assert callable(getattr(fastcache, name))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_drawing_imports_neither_diffusers_nor_transformers(
    backend: str, builds: BuildStore, tiny_model: Path, tmp_path: Path
):
    """A usual picture: they take seconds to import. What is not kept in the bundle may need them."""
    pytest.importorskip(backend, reason=f"needs {backend}")
    bundle = builds.bundle(tiny_model, backend=backend)
    script = (
        "import sys\n"
        "from fastcache.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert 'torch' in sys.modules\n"
        f"    found = [name for name in {BUILDING!r} if name in sys.modules]\n"
        "    print(*found)\n"
    )
    arguments = ["generate", "--engines", str(bundle.path), "--prompt", "a cat", "--steps", "4"]
    output = tmp_path / "cat.png"
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--cache-interval", "2", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert output.is_file()
    assert result.stdout.split() == [str(output)]


@pytest.fixture(scope="module")
def readme() -> list[Block]:
    assert README.is_file(), "README.md is missing: its blocks are part of what is tested"
    blocks = fenced_blocks(README.read_text(encoding="utf-8"))
    assert any(block.language == "python" for block in blocks), "README.md has no ```python block"
    return blocks


def test_readme_is_python_that_compiles_and_commands_that_exist(
    readme: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What `test_readme_runs` runs, in minutes."""
    from fastcache.cli import app

    for folder in re.findall(r"--engines (\S+)", README.read_text(encoding="utf-8")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)  # the commands before would have made them
    monkeypatch.chdir(tmp_path)
    commands: Any = typer.main.get_command(app)
    for block in readme:
        if block.language == "python":
            compile(block.text, str(README), "exec")
        elif block.language in ("console", "sh"):
            for line in shell_commands(block.text):
                _, name, *arguments = shlex.split(line, comments=True)
                commands.commands[name].make_context(name, arguments)


@pytest.mark.slow
def test_readme_runs(readme: list[Block], tmp_path: Path):
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", as_script(readme)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"


def test_readme_reader():
    text = "a\n```python\nx = 1\n```\n"
    text += "```console\n$ fastcache demo \\\n  --output out\nfastcache says hello\n```\n"
    text += "```sh\nmake demo\n.venv/bin/fastcache doctor\n```\n"
    python, console, sh = fenced_blocks(text)
    assert (python.language, python.text, python.line) == ("python", "x = 1\n", 3)
    assert [command.split() for command in shell_commands(console.text)] == [["fastcache", "demo", "--output", "out"]]
    assert list(shell_commands(sh.text)) == ["fastcache doctor"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_is_typed_and_its_wing_is_no_package(package: Path):
    assert (package / "__init__.py").is_file()
    assert (package / "py.typed").is_file()
    assert package.parent == ROOT or not (package.parent / "__init__.py").exists()


def test_every_file_opens_with_a_docstring():
    without = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert without == []


def test_library_code_neither_prints_nor_exits_nor_asserts():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in python_files()
        if path.relative_to(ROOT).as_posix() != "fastcache/cli.py"
        for line, what in outspoken_lines(ast.parse(path.read_text(encoding="utf-8")))
        if not (path.parent.name == "commands" and what == "os._exit")  # a command is a program, which may end itself
    ]
    assert found == []
