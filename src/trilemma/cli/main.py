"""The `trilemma` command: registers one file a command and turns errors into one clear line and an exit code.

Nothing here or in a command's module may import torch or numpy: `trilemma --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from trilemma.cli import (
    advise,
    bench,
    check,
    compare,
    compress,
    distill,
    evaluate,
    export,
    inspect,
    list_names,
    lm_eval,
    optimize,
    profile,
    report,
    run,
)
from trilemma.core.errors import TrilemmaError

app = typer.Typer(
    name="trilemma",
    help="Which version of this language model should run on this device, within these limits, and how do we know?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 all PASS, 2 bad input, 3 a limit FAILs or none is feasible, 4 INCONCLUSIVE.",
)

app.command("inspect")(inspect.inspect)
app.command("optimize")(optimize.optimize)
app.command("run")(run.run)
app.command("check")(check.check)
app.command("compress")(compress.compress)
app.command("distill")(distill.distill)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.evaluate)
app.command("lm-eval", context_settings=lm_eval.SETTINGS)(lm_eval.lm_eval)
app.command("compare")(compare.compare)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("profile")(profile.profile)
app.command("advise")(advise.advise)
app.command("list")(list_names.list_names)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"trilemma {version('trilemma')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an unexpected error.")] = False,
) -> None:
    if debug:
        os.environ["TRILEMMA_DEBUG"] = "1"


def main() -> NoReturn:
    """Run the command line and exit with its code; every failure is one line on stderr."""
    try:
        app()
    except SystemExit as done:
        if done.code == 130:
            _say("interrupted. Nothing half-written was left; `optimize` resumes when the same command is run again.")
        raise
    except TrilemmaError as error:
        _fail(error, str(error), error.exit_code)
    except MemoryError as error:
        _fail(error, "out of memory. Use a smaller model or context, or close other programs.", 2)
    except OSError as error:
        _fail(error, _explain_os_error(error), 2)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}. This is a bug; please report it with the output of"
        _fail(error, f"{message} the same command after `trilemma --debug`.", 1)
    sys.exit(0)


def _explain_os_error(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk{_of(error)}. Nothing half-written was left; free some space and run it again."
        )
    return f"{error.strerror or error}{_of(error)}."


def _of(error: OSError) -> str:
    return f" while writing {error.filename}" if error.filename else ""


def _fail(error: BaseException, message: str, code: int) -> NoReturn:
    if os.environ.get("TRILEMMA_DEBUG"):
        traceback.print_exception(error)
    _say(f"error: {message}")
    sys.exit(code)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
