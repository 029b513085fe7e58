"""The command line: `popjax generate`, `chat`, `inspect`, `plan`, `bench`, `calibrate`, ....

One file a command; what they share is in `options.py` (arguments), `terminal.py` (where output goes
and what an error becomes) and `tables.py`. Nothing here imports jax until a command runs, so help
is instant. Leaves out everything a library caller could want: that is in `popjax` itself.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from popjax.cli import bench, calibrate, chat, doctor, export, generate, inspect, plan, show
from popjax.cli import eval as evaluation
from popjax.cli import perplexity as text_perplexity
from popjax.cli.terminal import SETTINGS, forgiving_streams, log_to_stderr

EPILOG = (
    "Results go to stdout, progress and reports to stderr. Exit codes: 0 done, 1 failed, 2 wrong "
    "usage, 130 interrupted."
)

app = typer.Typer(
    name="popjax",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for run in (
    generate.generate,
    chat.chat,
    inspect.inspect,
    plan.plan,
    bench.bench,
    calibrate.calibrate,
    show.show,
    export.export,
    doctor.doctor,
):
    app.command()(run)
app.command("eval")(evaluation.evaluate)
app.command()(text_perplexity.perplexity)


def _print_version(asked: bool) -> None:
    if not asked:
        return
    try:
        typer.echo(f"popjax {version('popjax')}")
    except PackageNotFoundError:
        typer.echo("popjax (run from its sources, not installed)")
    raise typer.Exit()


@app.callback()
def _popjax(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="POPJAX_DEBUG", help="Show tracebacks of errors.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say on stderr what runs, and why not otherwise.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run Hugging Face language models that decode only what their prompt needs."""
    SETTINGS.debug = debug
    forgiving_streams()
    log_to_stderr(verbose)
    leave_out_tpu()


def leave_out_tpu(devices: Path = Path("/dev")) -> None:
    """Have jax start on the CPU where the TPU compiler is installed and there is no TPU.

    It would look for one for seconds, and print that there is none. Nothing is set where somebody
    chose a platform, or where jax has plugins for other chips.
    """
    if "JAX_PLATFORMS" in os.environ or find_spec("libtpu") is None:
        return
    chips = any(any(devices.glob(pattern)) for pattern in ("accel*", "vfio/*"))
    if not chips and find_spec("jax_plugins") is None and not entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported, which a command does


def main() -> None:
    """Entry point of the `popjax` command; ends the process with its exit code."""
    app(prog_name="popjax")


__all__ = ["app", "main"]
