"""The command line. Every error of the user's is one sentence on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from autocompress.errors import AutocompressError, RunError, TargetError
from autocompress.front import ParetoFront, format_accuracy
from autocompress.version import __version__

app = typer.Typer(
    name="autocompress",
    help="Compress a trained PyTorch model: search pruning, bit widths, activations and precision together, "
    "and get the Pareto front of file size versus accuracy.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_WIDE = 160
"""Columns of a table that goes into a file or a pipe."""
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
err = Console(stderr=True)

TaskOption = Annotated[
    str,
    typer.Option(
        "--task", "-t", help="Built-in task ('digits') or your own as package.module:function or file.py:function."
    ),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run under runs/, or the path of its folder.")
]
RunOrFile = Annotated[str, typer.Argument(metavar="RUN_OR_FILE", help="A run, or an .acz file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MaxSize = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        help="Largest file: bytes, or with a unit: 20KB (1 KB = 1000 bytes), 1.5MB, 16KiB, 2MiB.",
    ),
]
MinAccuracy = Annotated[float | None, typer.Option("--min-accuracy", help="Lowest validation accuracy, like 0.95.")]


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _version(shown: bool) -> None:
    if shown:
        sys.stdout.write(f"autocompress {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def search(
    context: typer.Context,
    task: TaskOption = "digits",
    space: Annotated[
        str,
        typer.Option(help="Search space: a name that 'autocompress spaces' lists, or a .yaml file."),
    ] = "default",
    budget: Annotated[
        int | None,
        typer.Option("--budget", "-b", help="Length in whole trials; 50 by default, or what fits the time budget."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option("--time-budget", help="No trial but the first begins that would end later: 90s, 30m, 1h30m."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed and one worker: same front.")] = 0,
    run: Annotated[
        str | None,
        typer.Option(help="Name (under runs/) or path of the run folder; new and numbered by default."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of fine-tuning a trial, by default the task's; 0 compresses without training."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Trials at a time; by default one per GPU, else one per CPU core."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to run trials on: 'auto' on one of its nodes or in a job, or host:port; "
            "by default a private Ray on this machine."
        ),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="Who proposes candidates: frontier (ours), tpe, nsga2, gp or random.")
    ] = "frontier",
    max_size: MaxSize = None,
    min_accuracy: MinAccuracy = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with this run (name or path) after a crash or a stop, or with a larger budget; "
            "its other settings stay."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the run folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search for the front of size versus accuracy and write its files into a run folder."""
    from autocompress import searching
    from autocompress.agent.run_folder import REPORT
    from autocompress.report.live import LiveView

    if resume is not None:
        _refuse(context, "task", "space", "epochs", "seed", "run", "sampler", "max_size", "min_accuracy")
    view = LiveView(err, shown=not (quiet or as_json))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, it ends as by Ctrl-C
    try:
        with view:
            if resume is not None:
                front = searching.resume(
                    resume,
                    budget=budget,
                    time_budget=time_budget,
                    workers=workers,
                    address=address,
                    listener=view,
                )
            else:
                front = searching.search(
                    task,
                    budget,
                    space,
                    time_budget=time_budget,
                    epochs=epochs,
                    seed=seed,
                    run=run,
                    workers=workers,
                    sampler=sampler,  # type: ignore[arg-type]
                    max_size=max_size,
                    min_accuracy=min_accuracy,
                    address=address,
                    listener=view,
                )
    except KeyboardInterrupt:
        kept = view.folder and view.folder.is_dir()  # a run that had not begun leaves nothing
        go_on = f"; finished trials are kept: go on by --resume {view.folder}" if kept else ""
        err.print(f"stopped{go_on}", style="yellow", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        print_json({"run": str(front.folder), **front.to_json()})
    elif quiet:
        sys.stdout.write(f"{front.folder}\n")
    else:
        _print_front(front)
        out.print(
            f"run folder: {front.folder}\npicture:    {front.folder / 'front.png'}\n"
            f"report:     {front.folder / REPORT}",
            highlight=False,
            soft_wrap=True,
        )
        _print_asked(front)


def _refuse(context: typer.Context, *names: str) -> None:
    """What was given, and is a run's for good."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [f"--{n.replace('_', '-')}" for n, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        raise RunError(
            f"{' and '.join(given)} cannot be given with --resume, which goes on as the run began: leave it out, "
            "or start a new run"
        )


def _print_asked(front: ParetoFront) -> None:
    """The file that the search was for, if it was given a size or an accuracy."""
    from autocompress.agent.run_config import read_config

    _, settings = read_config(front.folder)
    asked = settings["max_size_bytes"], settings["min_accuracy"]
    if asked == (None, None):
        return
    try:
        path = front.best(*asked).path
    except TargetError as missed:
        err.print(str(missed), style="yellow", highlight=False, soft_wrap=True)
    else:
        out.print(f"asked for:  {path}", highlight=False, soft_wrap=True)


def _print_front(front: ParetoFront) -> None:
    from autocompress.report.table import overfitting_sentence
    from autocompress.report.trials import failure_sentences

    out.print(front.table())
    if measured := overfitting_sentence(front):
        out.print(measured, highlight=False, soft_wrap=True)
    for sentence in failure_sentences(front.folder):
        err.print(sentence, style="yellow", highlight=False, soft_wrap=True)


@app.command()
def show(
    path: RunOrFile,
    as_json: JsonOption = False,
) -> None:
    """Show the front of a run, or what is inside an .acz file: layers, bits per weight, bytes."""
    if _is_artifact(path):
        _show_artifact(Path(path), as_json)
        return
    front = _front(path)
    if as_json:
        print_json(front.to_json())
    else:
        _print_front(front)


def _is_artifact(path: str | Path) -> bool:
    """A file, or the name of one that is not there: runs are folders."""
    return Path(path).is_file() or Path(path).suffix == ".acz"


def _show_artifact(path: Path, as_json: bool) -> None:
    from autocompress import read_artifact
    from autocompress.report.inside import inside_table

    artifact = read_artifact(path)
    if not as_json:
        out.print(inside_table(artifact, str(path)))
        return
    tensors = {
        name: {
            "shape": list(t.value.shape),
            "choice": t.choice,
            "transform": t.basis.transform.choice if t.basis else "none",
            "size_bytes": t.size_bytes,
        }
        for name, t in artifact.tensors.items()
    }
    sizes = {"size_bytes": artifact.size_bytes, "header_bytes": artifact.header_bytes}
    print_json({**sizes, "recipe": artifact.recipe.to_json(), "tensors": tensors})


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="An .acz file.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Compare two .acz files layer by layer: shapes, formats, zeros and bytes."""
    from autocompress import read_artifact
    from autocompress.report.inside import difference_table

    out.print(difference_table(read_artifact(one), read_artifact(other), (str(one), str(other))))


def _front(run: str) -> Any:
    from autocompress.agent.run_folder import existing_run
    from autocompress.front import FRONT_FILE, ParetoFront

    folder = existing_run(run)
    if not (folder / FRONT_FILE).is_file():
        raise RunError(f"run {str(folder)!r} has no finished trial yet: go on with it by --resume {folder}")
    return ParetoFront.read(folder)


@app.command()
def plot(
    path: RunOrFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf; by default front.png in the run."),
    ] = None,
) -> None:
    """Draw the front of a run, or where the bytes of an .acz file go."""
    try:
        if _is_artifact(path):
            from autocompress import read_artifact
            from autocompress.report.plot import plot_inside

            picture = output or Path(path).with_suffix(".png")
            sys.stdout.write(f"{plot_inside(read_artifact(path), picture)}\n")
        else:
            front = _front(path)
            sys.stdout.write(f"{front.plot(output or front.folder / 'front.png')}\n")
    except OSError as error:
        raise TargetError(f"cannot write {str(output)!r}: {error.strerror or error}") from error


@app.command()
def report(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write; by default report.html in the run.")
    ] = None,
) -> None:
    """Write one HTML page: the front, where the bytes of its files go, every trial, how to repeat the run."""
    from autocompress.agent.run_folder import REPORT

    front = _front(run)
    sys.stdout.write(f"{front.report(output or front.folder / REPORT)}\n")


@app.command()
def pick(
    run: RunArgument,
    max_size: MaxSize = None,
    min_accuracy: MinAccuracy = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Copy the chosen file here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose one file of a run: the best within --max-size, the smallest above --min-accuracy, or the knee."""
    from autocompress.files import write_file

    front = _front(run)
    constrained = max_size is not None or min_accuracy is not None
    point = front.best(max_size=max_size, min_accuracy=min_accuracy) if constrained else front.knee()
    path = point.path
    if output is not None:
        write_file(output, path.read_bytes())
        path = output
    if as_json:
        print_json({"file": str(path), **{k: v for k, v in asdict(point).items() if k != "folder"}})
        return
    test = "" if point.test_accuracy is None else f", test accuracy {format_accuracy(point.test_accuracy)}"
    out.print(
        f"{path}: {point.size_bytes} bytes, validation accuracy {format_accuracy(point.val_accuracy)}{test}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .acz file.")],
    task: TaskOption = "digits",
    as_json: Annotated[bool, typer.Option("--json", help="The same object on one line.")] = False,
) -> None:
    """Decode a file into a fresh model and measure it; prints one JSON object."""
    from autocompress import evaluate as measure_file

    result = asdict(measure_file(file, task))
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        print_json(result)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .acz file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="What to write: a name that ends with .onnx or .pt2.")],
    task: TaskOption = "digits",
    as_json: JsonOption = False,
) -> None:
    """Write the model of a file as ONNX or as an exported program of PyTorch, and measure what was written."""
    from autocompress import export as export_file

    made = export_file(file, task, output)
    if as_json:
        print_json({**asdict(made), "path": str(made.path)})
        return
    out.print(
        f"{made.path}: {made.size_bytes} bytes, validation accuracy {format_accuracy(made.val_accuracy)}, "
        f"test accuracy {format_accuracy(made.test_accuracy)}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def inspect(
    task: TaskOption = "digits",
    space: Annotated[str, typer.Option(help="Search space to bind to the model.")] = "default",
) -> None:
    """Show what can be compressed: layers, channel groups, dimensions, the size of the joint space."""
    from autocompress.report.inspection import inspection_tables
    from autocompress.space import BoundSpace, SearchSpace
    from autocompress.task import check_task, load_task
    from autocompress.trial.workshop import Workshop

    given = load_task(task)
    rules = SearchSpace.named(space)
    model = given.build()
    check_task(given, model)
    anatomy = Workshop(given, model, BoundSpace(()), Path(), 0).anatomy
    bound = rules.bind(anatomy)
    for table in inspection_tables(task, anatomy, rules.name, bound):
        out.print(table)
    if anatomy.left_alone:
        out.print("left alone:")
        for site, reason in anatomy.left_alone.items():
            out.print(f"  {site}: {reason}", highlight=False, soft_wrap=True)
    parameters = sum(p.numel() for p in model.parameters())
    out.print(
        f"{parameters:,} parameters; joint space of about 10^{bound.log10_size:.1f} recipes",
        highlight=False,
    )


@app.command()
def profile(
    task: TaskOption = "digits",
    space: Annotated[str, typer.Option(help="Search space whose choices are tried.")] = "default",
    output: Annotated[Path, typer.Option("--output", "-o", help="Heat map to write: .png, .svg or .pdf.")] = Path(
        "profile.png"
    ),
    as_json: JsonOption = False,
) -> None:
    """Try every choice alone, without training: how much does each layer feel it? A table and a heat map."""
    from autocompress import searching
    from autocompress.report.plot import check_picture, plot_profile
    from autocompress.report.sensitivity import sensitivity_table

    check_picture(output)
    measured = searching.profile(task, space, quiet=as_json)
    if as_json:
        print_json(measured.effects)
        return
    out.print(sensitivity_table(measured, f"{task}: sensitivity to space {space!r}, nats"))
    out.print(f"heat map: {plot_profile(measured, output)}", highlight=False, soft_wrap=True)


@app.command()
def techniques() -> None:
    """List every technique: its choices, its source, and what it cannot be applied to."""
    from autocompress.report.techniques import rows

    table = Table(title="techniques, by the dimension of a search space that offers them", title_justify="left")
    table.add_column("dimension", no_wrap=True)
    for name in ("choices (first: changes nothing)", "what it is", "source", "cannot apply to"):
        table.add_column(name)
    for row in rows():
        table.add_row(row.dimension, row.choices, row.what, row.sources, row.not_for)
    out.print(table)


@app.command()
def spaces() -> None:
    """List the packaged search spaces and explain their dimensions."""
    import autocompress.techniques  # noqa: F401
    from autocompress.space import SearchSpace, dimensions, space_files

    listed = Table(title="search spaces (--space NAME, or your own .yaml file)", title_justify="left")
    listed.add_column("name", no_wrap=True)
    listed.add_column("what it searches")
    listed.add_column("dimensions")
    for name in space_files():
        space = SearchSpace.named(name)
        named = dict.fromkeys([d for _, rule in space.rules for d in rule] + list(space.training))
        listed.add_row(name, space.description, ", ".join(named))
    out.print(listed)
    explained = Table(title="dimensions", title_justify="left")
    explained.add_column("name", no_wrap=True)
    explained.add_column("default")
    explained.add_column("what it is")
    for name, dimension in dimensions().items():
        explained.add_row(name, str(dimension.default), dimension.about)
    out.print(explained)


def main() -> None:
    # torch's threads spin while they wait for each other, which is minutes instead of seconds on a machine that is busy
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except AutocompressError as error:
        sys.stderr.write(f"autocompress: {error}\n")
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"autocompress: {error.strerror or error}{where}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
