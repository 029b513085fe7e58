"""Machines with TPUs on Google Cloud: create, set up, run on all workers, fetch logs, delete.

    python -m scripts.tpu_vm create my-tpu --target v6e:2x2 --zone us-east5-b
    python -m scripts.tpu_vm setup  my-tpu --target v6e:2x2 --zone us-east5-b dist/popjax-*.whl
    python -m scripts.tpu_vm run    my-tpu --target v6e:2x2 --zone us-east5-b -- popjax doctor
    python -m scripts.tpu_vm logs   my-tpu --target v6e:2x2 --zone us-east5-b
    python -m scripts.tpu_vm delete my-tpu --target v6e:2x2 --zone us-east5-b

--api compute (the default) is the Compute Engine API, --api tpu-vm the older one, which v4 needs.
--dry-run prints the exact commands and runs none; EACH stands for every worker there.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from popjax.targets import parse_target
from scripts.tpu_vm.clouds import CLOUDS, Cloud, Command
from scripts.tpu_vm.machines import checked

LOGS = "popjax-logs"
ENVIRONMENT = "popjax-env"
EACH = "EACH"  # a name that no worker can have


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code is 0, or that of the first command that failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Split off before argparse sees it: the worker's command has options of its own.
    end = words.index("--") if "--" in words else len(words)
    asked = _parser().parse_args(words[:end])
    asked.command = words[end + 1 :]
    try:
        if end < len(words) and asked.act is not run:
            raise ValueError(
                f"{asked.act.__name__} takes no command, and {shlex.join(words[end:])!r} was "
                "given: drop it, or use run"
            )
        cloud = CLOUDS[asked.api](
            checked("name", asked.name),
            checked("zone", asked.zone),
            parse_target(asked.target),
            asked.project and checked("project", asked.project),
        )
        if not asked.dry_run and shutil.which("gcloud") is None:
            raise ValueError(
                "gcloud is not on PATH: install it from https://cloud.google.com/sdk/docs/install "
                "and run `gcloud init`, or look at the commands with --dry-run"
            )
        return asked.act(cloud, asked)
    except (ValueError, OSError) as error:
        print(f"tpu_vm: error: {error}", file=sys.stderr)
        return 1


def create(cloud: Cloud, asked: argparse.Namespace) -> int:
    """Ask for the machines; returns when they run."""
    return _in_order(cloud.create(asked.spot), asked.dry_run)


def setup(cloud: Cloud, asked: argparse.Namespace) -> int:
    """Copy a wheel of popjax to every worker and install it with its TPU extra."""
    wheel = Path(asked.wheel)
    checked("wheel", wheel.name)
    if not wheel.is_file():
        raise ValueError(f"there is no wheel {wheel}: build one with `python -m build --wheel`")
    workers = _workers(cloud, asked.dry_run)
    code = _at_once([cloud.upload(worker, str(wheel)) for worker in workers], asked.dry_run)
    if code:
        return code
    command = install_command(wheel.name)
    return _at_once([cloud.ssh(worker, command) for worker in workers], asked.dry_run)


def install_command(wheel: str) -> str:
    """What a worker runs to install a wheel in its home; its own Python may be too old."""
    python = f"{ENVIRONMENT}/bin/python"
    steps = (
        "(command -v pip3 || (sudo apt-get update -q && sudo apt-get install -y -q python3-pip))",
        "pip3 install --user --quiet uv",
        f"~/.local/bin/uv venv --quiet --clear --python 3.13 {ENVIRONMENT}",
        f"~/.local/bin/uv pip install --quiet --python {python} './{wheel}[tpu]'",
        f"{ENVIRONMENT}/bin/popjax --version",
    )
    return " && ".join(steps)


def run(cloud: Cloud, asked: argparse.Namespace) -> int:
    """Run a command on all workers at once, as jax wants it, its output kept for `logs`."""
    if not asked.command:
        raise ValueError("there is nothing to run: give a command after --")
    command = worker_command(asked.command, asked.detach)
    workers = _workers(cloud, asked.dry_run)
    return _at_once([cloud.ssh(worker, command) for worker in workers], asked.dry_run)


def worker_command(words: Sequence[str], detach: bool) -> str:
    """What a worker's shell runs for a command, in the environment that `setup` made."""
    log = f"{LOGS}/$(hostname).log"
    ready = f'mkdir -p {LOGS} && export PATH="$HOME/{ENVIRONMENT}/bin:$PATH"'
    command = shlex.join(words)
    if detach:  # survives the end of the connection, as long runs must
        return f"{ready} && (nohup {command} > {log} 2>&1 < /dev/null &)"
    return f"set -o pipefail; {ready} && {command} 2>&1 | tee {log}"


def logs(cloud: Cloud, asked: argparse.Namespace) -> int:
    """Copy every worker's logs into a folder of its own."""
    commands = []
    for worker in _workers(cloud, asked.dry_run):
        folder = Path(asked.to) / worker
        if not asked.dry_run:
            folder.mkdir(parents=True, exist_ok=True)
        commands.append(cloud.download(worker, LOGS, str(folder)))
    return _at_once(commands, asked.dry_run)


def delete(cloud: Cloud, asked: argparse.Namespace) -> int:
    """Delete the machines and all that belongs to them; nothing on them is kept."""
    return _in_order(cloud.delete(), asked.dry_run)


def _workers(cloud: Cloud, dry_run: bool) -> list[str]:
    command = cloud.workers()
    if command is None:
        return cloud.named("")
    if dry_run:
        print(shlex.join(command))
        return [EACH]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"gcloud could not list the workers (exit code {done.returncode})")
    workers = cloud.named(done.stdout) if done.stdout.strip() else []
    if not workers:
        raise ValueError(f"{cloud.name} has no workers in {cloud.zone}: is it still being made?")
    return workers


def _in_order(commands: Sequence[Command], dry_run: bool) -> int:
    """Run commands one after the other; stop at the first that fails."""
    for command in commands:
        code = _at_once([command], dry_run)
        if code:
            return code
    return 0


def _at_once(commands: Sequence[Command], dry_run: bool) -> int:
    """Run commands side by side and wait for all; the first code in order that is not 0."""
    if dry_run:
        print("\n".join(shlex.join(command) for command in commands))
        return 0
    running = [subprocess.Popen(command) for command in commands]
    codes = [process.wait() for process in running]
    return next((code for code in codes if code), 0)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("name", help="of the instance, the group or the TPU")
    shared.add_argument("--target", required=True, help="chips and topology, such as v6e:2x2")
    shared.add_argument("--zone", required=True)
    shared.add_argument("--project", help="without it, the one that gcloud is set to")
    shared.add_argument("--api", choices=list(CLOUDS), default="compute")
    shared.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tpu_vm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    acts = parser.add_subparsers(required=True, metavar="create|setup|run|logs|delete")
    parsers = {}
    for act in (create, setup, run, logs, delete):
        about = (act.__doc__ or "").splitlines()[0]
        parsers[act] = acts.add_parser(act.__name__, parents=[shared], help=about)
        parsers[act].set_defaults(act=act)
    parsers[create].add_argument("--spot", action="store_true", help="cheaper, may be taken away")
    parsers[setup].add_argument("wheel", help="a wheel of popjax")
    parsers[run].add_argument("--detach", action="store_true", help="do not wait for its end")
    parsers[run].epilog = "The command follows after --."
    parsers[logs].add_argument("--to", default=LOGS, help="local folder (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
