"""`serve`: images over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcache.commands.options import EnginesOption, TrustedKey
from fastcache.console import notes


def serve(
    engines: EnginesOption,
    host: Annotated[str, typer.Option(help="The address; one beyond this machine needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 picks a free one.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of API keys, one a line.")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Images that may wait; beyond that 429.")] = 32,
    max_batch: Annotated[int, typer.Option(min=1, help="Images at once; above 1 a CPU may hold weights twice.")] = 8,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps that a request may ask for.")] = 150,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take; it may ask for less.")] = 300,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A further name to be asked by.")] = None,
    trusted_key: TrustedKey = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the engines; 0 means as many as torch uses.")] = 0,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's images API. SIGHUP loads it again, SIGTERM finishes what runs.

    Example: fastcache serve --engines demo-output/engines --port 8000
    """
    import logging
    import os

    try:
        from fastcache.serve.http.server import serve as serve_bundle
    except ImportError as error:
        from fastcache.errors import BackendUnavailable
        from fastcache_engines.extras import install

        raise BackendUnavailable(
            f"expected the packages of serving, got none ({error.name}); run: {install('serve')}"
        ) from error
    from fastcache.serve.http.limits import Limits
    from fastcache.serve.http.log import Unblocked

    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=form, level=logging.WARNING, handlers=[Unblocked()])
    logging.getLogger("fastcache").setLevel(logging.INFO)
    is_over = serve_bundle(
        engines,
        limits=Limits(max_batch=max_batch, queue=queue, max_steps=max_steps, timeout_s=timeout),
        host=host,
        port=port,
        api_key_file=api_key_file,
        allowed_hosts=allowed_host or (),
        threads=threads,
        trusted=trusted_key,
        listening=lambda url: notes.print(f"listening on {url}", markup=False, soft_wrap=True),
    )
    if not is_over:
        os._exit(0)  # a backend that still compiles in a thread crashes when the interpreter is taken down around it
