"""The command line: thin commands over the API. Exit codes: 0 success, 1 failure, 2 wrong argument or input.

This file registers the commands in the order of `mergetune --help`. The imports show which file defines each command.
"""

from typing import Annotated

import typer

from mergetune import __version__
from mergetune.cli.files import convert, export
from mergetune.cli.first_steps import demo, doctor
from mergetune.cli.images import cache
from mergetune.cli.listing import runs
from mergetune.cli.measuring import evaluate, path
from mergetune.cli.merging import compare, merge
from mergetune.cli.models import models
from mergetune.cli.options import SeveralValues
from mergetune.cli.paper import reproduce
from mergetune.cli.predicting import predict
from mergetune.cli.running import Commands
from mergetune.cli.training import fit, tune

app = typer.Typer(
    cls=Commands,
    help="Restore the zero-shot ability of a fine-tuned CLIP (MERGETUNE, arXiv 2601.10497).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Declares the options that stand before the command."""


app.command(cls=SeveralValues)(demo)
app.command()(doctor)
app.command()(models)
app.command()(cache)
app.command()(tune)
app.command()(fit)
app.command()(predict)
app.command()(runs)
app.command("eval", cls=SeveralValues)(evaluate)
app.command()(path)
app.command()(export)
app.command()(convert)
app.command(cls=SeveralValues)(reproduce)
app.command()(merge)
app.command(cls=SeveralValues)(compare)
