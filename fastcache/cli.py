"""The front door: commands and flags -> calls of the library; results on stdout, everything else on stderr.

Exit codes: 0 done; 2 wrong usage or bad input; 3 this machine or installation cannot do it; 4 a check failed; 5 a build
failed. The commands themselves are in `commands/`.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from fastcache.commands import (
    analyze,
    batch,
    bench,
    bundles,
    demo,
    evaluate,
    export_triton,
    generate,
    models,
    plan,
    serve,
)
from fastcache.console import GLOBAL_FLAGS, debug_asked, end, exit_code, log_level, set_up
from fastcache.installed import require_alone

_INTERRUPTED = 130  # what typer makes of Ctrl-C, without a word

app = typer.Typer(
    name="fastcache",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (
    demo.demo,
    bundles.doctor,
    bundles.build_engines,
    bundles.inspect,
    bundles.verify,
    generate.generate,
    bench.bench,
    plan.plan,
    evaluate.evaluate,
    analyze.analyze,
    batch.batch,
    export_triton.export_triton,
):
    app.command()(command)
# A server is set up by its environment: every flag of it is a variable, as FASTCACHE_HOST.
app.command(context_settings={"auto_envvar_prefix": "FASTCACHE"})(serve.serve)
app.add_typer(models.app, name="models")


def main() -> None:
    """Run the command line; an error is one line on stderr, with a traceback only under `--debug`."""
    arguments = [a for a in sys.argv[1:] if a not in GLOBAL_FLAGS]
    debug = debug_asked()
    try:
        require_alone()
    except ImportError as error:
        end(str(error), 3)
    try:
        set_up(log_level())
        _check_text(arguments)
        code = app(arguments, standalone_mode=False) or 0
        end("stopped" if code == _INTERRUPTED else "", code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except TyperException as error:
        message = error.format_message()
        end(f"{message} (see --help)" if message else "", 2)
    except (typer.Abort, KeyboardInterrupt):
        end("stopped", _INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        end(str(error) or type(error).__name__, exit_code(error))


def _check_text(arguments: list[str]) -> None:
    """Raises: `ValueError` for bytes that are no text, which Python hands on as lone surrogates."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(f"expected arguments in UTF-8, got {os.fsencode(argument)!r}; write it as text") from None


def _version(asked: bool) -> None:
    if asked:
        import fastcache

        typer.echo(fastcache.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show logs and other libraries' warnings; at any place.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and hints, twice no warnings either; at any place.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; at any place.")] = False,
) -> None:
    """Draw with a diffusion U-Net faster: all of it in some steps, only its shallow layers in the others.

    Start with `fastcache demo`. FASTCACHE_LOG=error|warning|info|debug says how much is shown, as -q and -v do.
    """


if __name__ == "__main__":
    main()
