"""The rules of the house that no linter holds: lazy imports, pages that run, quiet library code."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from build_store import BuildStore
from fastcache.bundle.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))
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
FENCE = re.compile(r"^(<!-- parsed only -->\n)?```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?fastcache\s")


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown text; `line` is that of its first line of content, from 1.

    One under `<!-- parsed only -->` takes minutes, a server, or a model that is not here: it is read, not run.
    """

    language: str
    text: str
    line: int
    runs: bool = True


def fenced_blocks(markdown: str) -> list[Block]:
    return [
        Block(match[2], match[3], markdown.count("\n", 0, match.start(3)) + 1, match[1] is None)
        for match in FENCE.finditer(markdown)
    ]


def blocks_of(page: Path) -> list[Block]:
    return fenced_blocks(page.read_text(encoding="utf-8"))


def shell_commands(text: str) -> Iterator[str]:
    """The fastcache commands of a console or sh block; where lines begin with `$`, the others are output."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in prompted or lines:
        if COMMAND.match(line):
            yield line.removeprefix(".venv/bin/")


def as_script(page: Path) -> str:
    """One Python program that does what a reader of the page would do, block by block."""
    script = ["import subprocess", "namespace = {'__name__': '__main__'}"]
    for block in filter(lambda block: block.runs, blocks_of(page)):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # tracebacks then name the page's own lines
            script.append(f"exec(compile({source!r}, {str(page)!r}, 'exec'), namespace)")
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


def loaded_by(names: Sequence[str], *arguments: object) -> tuple[str, list[str]]:
    """What a command prints, and which of some modules its process has imported by its end."""
    script = (
        "import sys\n"
        "from fastcache.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print('loaded', *[name for name in {tuple(names)!r} if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    said, _, loaded = result.stdout.rpartition("loaded")
    return said, loaded.split()


def test_inspect_needs_no_torch(tiny_bundle: Bundle):
    document, loaded = loaded_by(HEAVY, "inspect", tiny_bundle.path, "--json", "-q")
    assert (json.loads(document)["backend"], loaded) == (tiny_bundle.manifest.backend, [])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name: str):
    import fastcache

    assert callable(getattr(fastcache, name))


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_drawing_imports_neither_diffusers_nor_transformers(
    backend: str, builds: BuildStore, tiny_model: Path, tmp_path: Path
):
    """A usual picture: they take seconds to import. What is not kept in the bundle may need them."""
    pytest.importorskip(backend, reason=f"needs {backend}")
    bundle = builds.bundle(tiny_model, backend=backend)
    output = tmp_path / "cat.png"
    arguments = ["generate", "--engines", bundle.path, "--prompt", "a cat", "--steps", 4, "--cache-interval", 2]
    said, loaded = loaded_by(("torch", *BUILDING), *arguments, "--output", output)
    assert output.is_file()
    assert (said.split(), loaded) == ([str(output)], ["torch"])


def test_readme_is_read_in_a_minute():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any(block.language == "python" for block in blocks_of(README))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_python_that_compiles_and_commands_that_exist(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What `test_page_runs` runs, in minutes."""
    from fastcache.cli import app

    for folder in re.findall(r"--(?:engines|plans) ([^\s`]+)", page.read_text(encoding="utf-8")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)  # the commands before would have made them
    monkeypatch.chdir(tmp_path)
    commands: Any = typer.main.get_command(app)
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, str(page), "exec")
        elif block.language in ("console", "sh"):
            for line in shell_commands(block.text):
                _, name, *arguments = shlex.split(line, comments=True)
                commands.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages_lead_somewhere(page: Path):
    """Links within the repository, to a heading too."""
    missing: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (heading and heading not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_the_site_builds_without_a_warning(tmp_path: Path):
    """mkdocs runs as a program; without the extra `docs` there is none."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install 'fastcache-diffusion[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for page in ("index", "api", "choosing"):
        text = (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8")
        assert "build_engines" in text or page == "choosing"
        assert "../tools/" not in text


def anchors(page: Path) -> list[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


def do_in(folder: Path, script: str) -> None:
    """Run a Python program there, with the command `fastcache` at hand."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page: Path, builds: BuildStore, tmp_path: Path):
    """README from nothing, every other page with a bundle in engines/demo."""
    script = as_script(page)
    if script.count("\n") < 2:
        pytest.skip("nothing on this page runs")
    if page != README:
        shutil.copytree(builds.bundle("demo", dtype="auto").path, tmp_path / "engines" / "demo")
    do_in(tmp_path, script)


def test_readme_reader():
    text = "a\n```python\nx = 1\n```\n"
    text += "```console\n$ fastcache demo \\\n  --output out\nfastcache says hello\n```\n"
    text += "```sh\nmake demo\n.venv/bin/fastcache doctor\n```\n"
    text += "<!-- parsed only -->\n```sh\nfastcache serve\n```\n"
    python, console, sh, read = fenced_blocks(text)
    assert (python.language, python.text, python.line) == ("python", "x = 1\n", 3)
    assert [command.split() for command in shell_commands(console.text)] == [["fastcache", "demo", "--output", "out"]]
    assert list(shell_commands(sh.text)) == ["fastcache doctor"]
    assert (sh.runs, read.runs) == (True, False)


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
