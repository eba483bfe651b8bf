"""The ``carryover`` command."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.checking import describe
from deploy.importing import function
from deploy.launch import launch
from deploy.settings import load
from protocol.errors import CarryoverError, RunFailed, SettingsError

FAILED, INVALID, INTERRUPTED = 1, 2, 130  # exit statuses beside 0

app = typer.Typer(
    help="Train over slow links: compressed updates with error feedback, through a parameter server on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Time the kernels, count the bytes.", no_args_is_help=True)
app.add_typer(bench, name="bench")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Settings file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change, as in rounds=100.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of Carryover's own errors.")]
Numel = Annotated[int, typer.Option(min=1000, help="Elements of the vector.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Also write all figures to this file.")
]


@app.command()
def train(
    file: RunFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; by default a Ray of the run's own.")] = None,
    debug: Debug = False,
) -> None:
    """Train a model and write a run directory."""
    settings = load(file, overrides or ())
    try:
        launch(settings.train, settings, address)
    except KeyboardInterrupt:  # here, because typer would take it and say only "Aborted!"
        _say("stopped by Ctrl-C; what was done is saved")
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def check(file: RunFile, overrides: Overrides = None, debug: Debug = False) -> None:
    """Validate settings; print them resolved, with memory and bytes per round. Trains nothing."""
    settings = load(file, overrides or ())
    typer.echo(describe(settings, function(settings.train, settings.arguments)))


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR ...", help="Run directories.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Write report.html of a run, or a comparison of several runs."""
    from deploy.report import write_report  # matplotlib takes a second that the other commands need not wait for

    typer.echo(write_report(run_dirs))


@bench.command("kernels")
def bench_kernels(
    numel: Numel = 25_000_000,
    ratio: Annotated[float, typer.Option(help="Share of the elements that sparse compressors send.")] = 0.01,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all contenders take turns.")] = 7,
    threads: Annotated[str, typer.Option(help="Threads, one run for each number.")] = "1,2",
    device: Annotated[str, typer.Option(help="Where the vectors are: cpu or cuda.")] = "cpu",
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Time encoding and decoding beside the speed of the memory and what is ordinarily used."""
    from deploy.bench import kernels

    kernels.run(kernels.Options.parse(numel, ratio, repeats, threads, device), json)


@bench.command("wire")
def bench_wire(numel: Numel = 25_000_000, json: JsonFile = None, debug: Debug = False) -> None:
    """Count the bytes of messages, index codes and value codes beside what information theory allows."""
    from deploy.bench import wire

    wire.run(numel, json)


def main() -> None:
    """Entry point: errors are one sentence, tracebacks only of the user's own code or with --debug."""
    debug = "--debug" in sys.argv
    try:
        app()
    except CarryoverError as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, RunFailed) and (debug or not error.expected):
            sys.stderr.write(error.details)
        _say(str(error))
        sys.exit(INVALID if isinstance(error, SettingsError) else FAILED)


def _say(text: str) -> Any:
    typer.echo(f"carryover: {text}", err=True)


if __name__ == "__main__":
    main()
