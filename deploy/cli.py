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


@app.command()
def compare(
    file: RunFile,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'[LABEL: ]key=value ...'",
            help="One variation: settings to change, with a label for the table if you like, as in "
            "'dense: uplink=none downlink=none'. Once for each; without any, the settings file as it stands.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to run, from the seed of the settings on.")] = 3,
    baseline: Annotated[bool, typer.Option("--baseline", help="Run the settings file as it stands too.")] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Also show the rounds and bytes until the running mean of this reported quantity gets there.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", file_okay=False, help="Folder for the runs; by default storage.dir/NAME-compare."),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time, each in a process of its own; only their times depend on it.")
    ] = 1,
    reuse: Annotated[
        bool,
        typer.Option("--reuse", help="Keep the finished runs in DIR that have exactly these settings."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", dir_okay=False, help="Also write the plot to this file.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run variations of one settings file over several seeds; print their table, draw their plots.

    Runs are on the inline backend without a metrics port, whatever the file says: one process a run and, to the bit,
    the result of a run on Ray. backend=ray and metrics.port=PORT on the command line count.

    An earlier comparison in DIR moves to DIR.1, unless --reuse takes its finished runs over. Ctrl-C stops after the
    round; with --reuse the comparison goes on later.
    """
    from deploy.compare.command import compare  # matplotlib again

    try:
        compare(file, overrides or (), vary or (), seeds, baseline, target, out, jobs, reuse, plot)
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C; what is finished is kept, and --reuse goes on from there")
        raise typer.Exit(INTERRUPTED) from None


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
