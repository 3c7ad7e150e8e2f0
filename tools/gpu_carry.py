"""What a machine without a network lacks -> wheels in portions that travel with the checkout, and whole again there.

`join` runs on that machine before anything is installed, so at that end this file needs nothing but Python.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20  # that travels in a call: the checkout, and a portion
LEFT_BYTES = 2**20  # for what else there may be
LISTED = "portions.json"
PYTHON, GLIBC = "3.12", (17, 24, 27, 28, 31, 34, 35)
# What the card's image holds of what fastcache and these steps need, by its own list of packages.
ON_CARD = frozenset(
    {
        *("accelerate", "annotated-doc", "anyio", "click", "filelock", "h11", "huggingface-hub"),
        *("iniconfig", "numpy", "onnx", "onnx-ir", "onnxscript", "packaging", "pillow"),
        *("pluggy", "prometheus-client", "pygments", "regex", "requests", "rich", "safetensors"),
        *("scipy", "shellingham", "tokenizers", "torch", "transformers", "triton", "typing-extensions"),
        *("zipp",),
    }
)
WANTED = ("fastcache-diffusion[serve]", "DeepCache", "pytest")
_MARKERS = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
}


def missing(wanted: Sequence[str], there: frozenset[str] = ON_CARD) -> dict[str, str]:
    """The packages to carry, and the versions that are installed here: all that these need and is not there.

    Raises: `ValueError` for one that is not installed here.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found, seen, open_ = dict[str, str](), set[tuple[str, str]](), [Requirement(text) for text in wanted]
    own = canonicalize_name(Requirement(wanted[0]).name)
    while open_:
        one = open_.pop()
        name, extras = canonicalize_name(one.name), sorted(one.extras)
        if name in there or (key := (name, ",".join(extras))) in seen:
            continue
        seen.add(key)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise ValueError(
                f"expected {name} to be installed here, got no such package; run: pip install {one}"
            ) from None
        if name != own:  # the checkout is that itself
            found[name] = distribution.version
        for text in distribution.requires or ():
            needed = Requirement(text)
            marks = [_MARKERS | {"extra": extra} for extra in extras or [""]]
            if needed.marker is None or any(needed.marker.evaluate(mark) for mark in marks):
                open_.append(needed)
    return dict(sorted(found.items()))


def download(packages: Mapping[str, str], folder: Path) -> None:
    """Fetch wheels for the card's Python. Raises: `RuntimeError` with pip's reason."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--disable-pip-version-check"]
    for minor in reversed(GLIBC):
        command += ["--platform", f"manylinux_2_{minor}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64"]
    ran = subprocess.run(
        [*command, *(f"{name}=={version}" for name, version in packages.items())],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        lines = ran.stderr.strip().splitlines()
        raise RuntimeError(f"pip download ended with code {ran.returncode}: {lines[-1] if lines else ''}")


def checkout_bytes(root: Path) -> int:
    """What of a checkout travels: files that are tracked, and others that git does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    files = [root / name for name in names if name]
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclass(frozen=True)
class Part:
    """A stretch of a file that goes into a portion."""

    name: str
    start: int
    num_bytes: int


def portions(sizes: Mapping[str, int], most: int) -> list[list[Part]]:
    """Files by the portion that they go into, in order; one that does not fit is split.

    Raises: `ValueError` where there is no room at all.
    """
    if most < 1:
        raise ValueError(f"expected room beside the checkout, got {most} bytes; carry a smaller checkout")
    found: list[list[Part]] = [[]]
    left = most
    for name, size in sizes.items():
        start = 0
        while start < size:
            if left == 0:
                found.append([])
                left = most
            length = min(size - start, left)
            found[-1].append(Part(name, start, length))
            start, left = start + length, left - length
    return found


def pack(files: Sequence[Path], folder: Path, most: int) -> list[Path]:
    """Write files as portions, `folder`/1 and so on, each with the list of all parts and the files' hashes."""
    parts = portions({file.name: file.stat().st_size for file in files}, most)
    by_name = {file.name: file for file in files}
    hashes = {file.name: _sha256(file) for file in files}
    made = list[Path]()
    for number, own in enumerate(parts, 1):
        place = folder / str(number)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for part in own:
            with by_name[part.name].open("rb") as stream:
                stream.seek(part.start)
                (place / f"{part.name}.{part.start:012}").write_bytes(stream.read(part.num_bytes))
        (place / LISTED).write_text(json.dumps({"portions": len(parts), "sha256": hashes}))
        made.append(place)
    return made


def join(portion: Path, into: Path) -> list[Path]:
    """Bring a portion's parts to a folder, and once all are there put the files together: these, else none.

    Raises: `ValueError` for a file that is not the one that was packed.
    """
    listed: dict[str, Any] = json.loads((portion / LISTED).read_text())
    parts = into / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    for part in portion.iterdir():
        shutil.copy(part, parts / (f"{portion.name}.done" if part.name == LISTED else part.name))
    if len(list(parts.glob("*.done"))) < listed["portions"]:
        return []
    return [_whole(name, sha256, parts, into) for name, sha256 in listed["sha256"].items()]


def _whole(name: str, sha256: str, parts: Path, into: Path) -> Path:
    temporary = into / f".{name}.tmp"
    with temporary.open("wb") as stream:
        for part in sorted(part for part in parts.iterdir() if part.name.rpartition(".")[0] == name):
            stream.write(part.read_bytes())
    if _sha256(temporary) != sha256:
        raise ValueError(f"expected {name} as it was packed, got another; bring every portion again")
    return temporary.replace(into / name)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bring_command(portion: Path, last: bool) -> str:
    """What a call runs on the card for its portion, in the checkout; after the last, everything can be imported."""
    joined = f"python3 tools/gpu_carry.py {portion} /tmp/carried"
    if not last:
        return joined
    install = "python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site"
    return f'{joined} && {install} /tmp/carried/*.whl && export PYTHONPATH="/tmp/site:$PWD:$PWD/engines:$PWD/kernels"'


if __name__ == "__main__":
    whole = join(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{len(whole)} files are whole" if whole else "more portions are to come")
