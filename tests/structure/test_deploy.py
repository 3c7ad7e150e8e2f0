"""examples/deploy: what its files name is there: sources, extras, flags, routes, and times that agree."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import typer
import yaml

from fastcache.cli import app
from fastcache.serve.http.guard import PROBES
from fastcache.serve.http.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: Any = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
UNIT = (DEPLOY / "fastcache.service").read_text(encoding="utf-8")
DEPLOYMENT, SERVICE = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
CONTAINER: Any = DEPLOYMENT["spec"]["template"]["spec"]["containers"][0]
PORT = 8000


def instruction(name: str) -> list[str]:
    """A Dockerfile's instruction in its exec form, the last one of this name."""
    found = re.findall(rf"^ *{name} (\[.+\])$", DOCKERFILE, re.MULTILINE)
    return yaml.safe_load(found[-1])


def test_the_image_is_made_of_what_is_there() -> None:
    copied = [file for line in re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE) for file in line.split()]
    assert {"pyproject.toml", "CMakeLists.txt", "constraints.txt", "fastcache", "engines", "kernels"} <= set(copied)
    assert [file for file in copied if not (ROOT / file).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    read = project["project"]["readme"], *project["project"].get("license-files", [])
    assert set(read) <= set(copied)  # what the build reads besides the packages
    extras = re.findall(r"EXTRAS=([\w,-]+)", DOCKERFILE)
    assert len(extras) == 2
    assert {extra for own in extras for extra in own.split(",")} <= set(project["project"]["optional-dependencies"])


def test_every_command_is_one_that_serve_takes() -> None:
    serve: Any = typer.main.get_command(app)
    flags = {flag for parameter in serve.commands["serve"].params for flag in parameter.opts}
    started = next(line for line in UNIT.splitlines() if line.startswith("ExecStart="))
    executable, command, *unit = shlex.split(started.removeprefix("ExecStart="))
    entry = instruction("ENTRYPOINT")
    assert (Path(executable).name, command) == ("fastcache", "serve")
    assert entry[:2] == ["fastcache", "serve"]
    for given in (entry[2:] + instruction("CMD"), COMPOSE["services"]["fastcache"]["command"], CONTAINER["args"], unit):
        named = [word for word in given if word.startswith("--")]
        assert named
        assert set(named) <= flags


def test_ports_probes_and_users_agree() -> None:
    entry = instruction("ENTRYPOINT")
    checked = re.findall(r"HEALTHCHECK .*\\\n *CMD .*127\.0\.0\.1:(\d+)(/\w+)'", DOCKERFILE)
    assert entry[entry.index("--port") + 1] == str(PORT)
    assert [(int(port), path in PROBES) for port, path in checked] == [(PORT, True)]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"]["path"] in PROBES
        assert CONTAINER[probe]["httpGet"]["port"] == PORT
    assert CONTAINER["ports"][0]["containerPort"] == SERVICE["spec"]["ports"][0]["port"] == PORT
    user = DEPLOYMENT["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"--uid {user} " in DOCKERFILE
    assert f"USER {user}" in DOCKERFILE


def test_there_is_time_to_end_the_longest_request() -> None:
    longest = Limits().timeout_s
    graces = [
        int(COMPOSE["services"]["fastcache"]["stop_grace_period"].removesuffix("s")),
        DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"],
        int(re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[0]),
    ]
    assert min(graces) > longest
