"""The command line: one file per verb, imported when it is chosen, so that `--help` and `plan` stay lean."""

from __future__ import annotations

import sys
from typing import Any

import typer

from packlight.cli import demo, evaluate, export, fit, generate, lab, plan, prove, prune, quantize, report, serve
from packlight.cli.output import complain
from packlight.errors import PacklightError

INTERRUPTED = 130
GO_ON = "interrupted: give the same command again to go on"
UsageMistake: type[Exception] = typer.BadParameter.__mro__[1]
"""UsageError of click, or of the copy of click that newer versions of typer carry and do not export."""

app = typer.Typer(
    name="packlight",
    help="Fit a language model into the machine you have, and prove what it cost.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("plan")(plan.plan)
app.command("fit")(fit.fit)
app.command("quantize")(quantize.quantize)
app.command("prune")(prune.prune)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("prove")(prove.prove)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("demo")(demo.demo)
app.add_typer(lab.app)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Fit a language model into the machine you have, and prove what it cost."""
    if version:
        from packlight import __version__

        print(f"packlight {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 usage or bad input, 3 budget missed, 130 interrupted."""
    try:
        code = app(arguments, standalone_mode=False)
    except PacklightError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except UsageMistake as error:
        complain(_usage(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        complain(GO_ON)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(0)
    except MemoryError:
        complain("this machine's memory is not enough: close other programs, or choose a smaller model or context")
        sys.exit(1)
    except OSError as error:  # a file that went away, a disk that failed: not for us to mend, nor a bug
        complain(f"{error.filename or 'the system'}: {error.strerror or error}")
        sys.exit(1)
    if code == INTERRUPTED:  # what some versions of typer make of Ctrl-C
        complain(GO_ON)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> str:
    """One sentence of a mistake in the words of the command line, and where to look."""
    command = "packlight" if error.ctx is None else error.ctx.command_path
    return f"{error.format_message().removesuffix('.')}: see {command} --help"
