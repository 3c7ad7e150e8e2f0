"""`serve`: images over HTTP."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from fastcache.commands.options import TrustedKey
from fastcache.console import notes


def serve(
    engines: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR", help="A bundle, or NAME=DIR; again for each further one. The first is the default."
        ),
    ] = None,
    models: Annotated[
        Path | None, typer.Option(help="In place of --engines: a TOML file of models, read again at SIGHUP.")
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="What loaded bundles may take together, as 6GiB; others wait outside.")
    ] = None,
    plans: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="What `plan --frontier` made for one of the bundles; again for others."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address; one beyond this machine needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 picks a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of API keys, one a line.")] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line, that may also add, swap and drop models.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Images that may wait; beyond that 429.")] = 32,
    max_batch: Annotated[int, typer.Option(min=1, help="Images at once; above 1 a CPU may hold weights twice.")] = 8,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps that a request may ask for.")] = 150,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take; it may ask for less.")] = 300,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A further name to be asked by.")] = None,
    trusted_key: TrustedKey = None,
    log_format: Annotated[str, typer.Option(help="text, or json: a line of JSON for each line.")] = "text",
    threads: Annotated[int, typer.Option(min=0, help="Threads of the engines; 0 means as many as torch uses.")] = 0,
) -> None:
    """Serve bundles over HTTP, as OpenAI's images API; a request's `model` chooses.

    SIGHUP loads them again, SIGTERM finishes what runs. docs/serving.md says what requests may hold.

    Example: fastcache serve --engines demo-output/engines --port 8000
    """
    import logging
    import os

    from fastcache.serve.models.listed import Offer, listed, read_models

    if (models is None) == (not engines):
        raise ValueError(
            "expected --engines DIR, once for each bundle, or --models FILE, got " + ("both" if models else "neither")
        )
    offered = [listed(one) for one in engines or ()] if models is None else read_models(models)
    _begin(offered[0].engines, trusted_key)
    try:
        from fastcache.serve.http.server import serve as serve_offer
    except ImportError as error:
        from fastcache.errors import BackendUnavailable
        from fastcache_engines.extras import install

        raise BackendUnavailable(
            f"expected the packages of serving, got none ({error.name}); run: {install('serve')}"
        ) from error
    from fastcache.serve.http.limits import Limits
    from fastcache.serve.http.log import JsonLines, Lines, Unblocked
    from fastcache.serve.models.memory import bytes_of

    if log_format not in ("text", "json"):
        raise ValueError(f"expected --log-format text or json, got {log_format}")
    handler = Unblocked()
    handler.setFormatter(JsonLines() if log_format == "json" else Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fastcache").setLevel(logging.INFO)
    is_over = serve_offer(
        Offer(
            tuple(offered),
            file=models,
            memory_limit_bytes=None if memory_limit is None else bytes_of(memory_limit),
            plans=tuple(plans or ()),
            trusted=trusted_key,
        ),
        limits=Limits(max_batch=max_batch, queue=queue, max_steps=max_steps, timeout_s=timeout),
        host=host,
        port=port,
        api_key_file=api_key_file,
        admin_key_file=admin_key_file,
        allowed_hosts=allowed_host or (),
        threads=threads,
        listening=lambda url: notes.print(f"listening on {url}", markup=False, soft_wrap=True),
    )
    if not is_over:
        os._exit(0)  # a backend that still compiles in a thread crashes when the interpreter is taken down around it


def _begin(engines: Path, trusted: Path | None) -> None:
    """Begin to import a bundle's engines while the server's packages are imported, if it is a bundle."""
    from fastcache.bundle.bundle import read_manifest
    from fastcache.errors import BundleError
    from fastcache.pipeline.loading import begin

    with contextlib.suppress(BundleError, ValueError):  # said where the bundle is loaded
        begin(read_manifest(engines, trusted))
