"""The TPU machine scripts against a gcloud that only writes down what it is asked."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popjax.targets import CHIPS, parse_target
from scripts.tpu_vm import machines
from scripts.tpu_vm.__main__ import main, worker_command

# Answers like the real one where something is listed; fails where its arguments hold FAIL_ON.
GCLOUD = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
words = " ".join(sys.argv[1:])
if os.environ.get("FAIL_ON") and os.environ["FAIL_ON"] in words:
    sys.exit(7)
if "list-instances" in words or "describe" in words:
    print(os.environ.get("LISTING", ""))
"""
PLACE = ["--zone", "us-east5-b"]
SINGLE = ["--target", "v6e:2x2", *PLACE]
SLICE = ["--target", "v5p:2x2x2", *PLACE, "--project", "my-project"]
OLDER = ["--target", "v4:2x2x2", *PLACE, "--api", "tpu-vm"]

Run = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def tpu_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script with the recording gcloud: its exit code, and what gcloud was asked."""
    folder, record = tmp_path / "bin", tmp_path / "record"
    folder.mkdir()
    fake = folder / "gcloud"
    fake.write_text(GCLOUD.format(python=sys.executable))
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))

    def run(*arguments: str, **environment: str) -> tuple[int, list[list[str]]]:
        record.write_text("")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = main(arguments)
        return code, [json.loads(line) for line in record.read_text().splitlines()]

    return run


def flags(command: list[str]) -> dict[str, str]:
    """The --name=value words of a command."""
    return dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)


def test_an_instance_is_created_on_compute_engine(tpu_vm: Run) -> None:
    code, (command,) = tpu_vm("create", "my-tpu", *SINGLE)
    assert code == 0
    assert command[:4] == ["compute", "instances", "create", "my-tpu"]
    assert flags(command) == {
        "--machine-type": "ct6e-standard-4t",
        "--image-family": machines.IMAGE_FAMILY,
        "--image-project": machines.IMAGE_PROJECT,
        "--boot-disk-size": "200GB",
        "--maintenance-policy": "TERMINATE",
        "--scopes": "cloud-platform",
        "--zone": "us-east5-b",
    }


def test_spot_machines_are_asked_for_in_both_ways(tpu_vm: Run) -> None:
    _, (command,) = tpu_vm("create", "my-tpu", *SINGLE, "--spot")
    assert flags(command)["--provisioning-model"] == "SPOT"
    _, (command,) = tpu_vm("create", "my-tpu", *OLDER, "--spot")
    assert "--spot" in command


def test_several_hosts_are_one_slice_of_a_group(tpu_vm: Run) -> None:
    code, commands = tpu_vm("create", "my-tpu", *SLICE)
    assert code == 0
    policy, template, group, resize = commands
    assert policy[1:4] == ["resource-policies", "create", "workload-policy"]
    assert flags(policy)["--accelerator-topology"] == "2x2x2"
    assert flags(policy)["--region"] == "us-east5" and "--zone" not in flags(policy)
    assert template[1:4] == ["instance-templates", "create", "my-tpu"]
    assert flags(template)["--machine-type"] == "ct5p-hightpu-4t"
    # The group wants whole addresses of both.
    place = "projects/my-project/regions/us-east5"
    assert flags(group)["--template"] == f"{place}/instanceTemplates/my-tpu"
    assert flags(group)["--workload-policy"] == f"{place}/resourcePolicies/my-tpu"
    assert flags(resize)["--size"] == "2"
    assert all(flags(command)["--project"] == "my-project" for command in commands)


def test_a_group_needs_the_project(tpu_vm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, commands = tpu_vm("create", "my-tpu", *SLICE[:-2])
    assert (code, commands) == (1, [])
    assert "give --project" in capsys.readouterr().err


def test_the_older_api_creates_by_accelerator_type(tpu_vm: Run) -> None:
    _, (command,) = tpu_vm("create", "my-tpu", *OLDER)
    assert command[:5] == ["compute", "tpus", "tpu-vm", "create", "my-tpu"]
    assert flags(command) == {
        "--accelerator-type": "v4-16",
        "--version": "tpu-ubuntu2204-base",
        "--zone": "us-east5-b",
    }


@pytest.mark.parametrize(
    ("target", "accelerator"),
    [("v5e:2x2", "v5litepod-4"), ("v5e:4x4", "v5litepod-16"), ("v5p:2x2x1", "v5p-8")],
)
def test_accelerator_types(target: str, accelerator: str) -> None:
    assert machines.accelerator_type(parse_target(target)) == accelerator


def test_every_listed_topology_has_machines_somewhere() -> None:
    for chip in CHIPS.values():
        for topology in chip.topologies:
            target = parse_target(f"{chip.name}:{topology}")
            assert machines.accelerator_type(target)
            if machines.CHIPS[chip.name].machines and target.chips >= 4:
                _, hosts = machines.machine(target)
                assert hosts >= 1


def test_setup_copies_and_installs_on_every_worker(tpu_vm: Run, tmp_path: Path) -> None:
    wheel = tmp_path / "popjax-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    listing = "10.0.0.1\n10.0.0.2"
    code, commands = tpu_vm("setup", "my-tpu", *OLDER, str(wheel), LISTING=listing)
    assert code == 0
    describe, *rest = commands
    assert describe[3] == "describe"
    copies = sorted(flags(c)["--worker"] for c in rest if c[3] == "scp" and str(wheel) in c)
    installs = {flags(c)["--worker"]: flags(c)["--command"] for c in rest if c[3] == "ssh"}
    assert copies == sorted(installs) == ["0", "1"]
    assert all(f"./{wheel.name}[tpu]" in command for command in installs.values())


def test_setup_stops_where_a_copy_fails(tpu_vm: Run, tmp_path: Path) -> None:
    wheel = tmp_path / "popjax-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    code, commands = tpu_vm("setup", "my-tpu", *SINGLE, str(wheel), FAIL_ON="scp")
    assert code == 7
    assert [command[1] for command in commands] == ["scp"]


def test_run_reaches_every_worker_of_a_group(tpu_vm: Run) -> None:
    listing = "my-tpu-a1b2\nmy-tpu-c3d4"
    code, commands = tpu_vm(
        "run", "my-tpu", *SLICE, "--", "popjax", "generate", "it's", LISTING=listing
    )
    assert code == 0
    assert commands[0][1:4] == ["instance-groups", "managed", "list-instances"]
    assert sorted(command[2] for command in commands[1:]) == listing.split()
    assert all("""popjax generate 'it'"'"'s'""" in c[3] for c in commands[1:])


def test_the_worker_keeps_the_command_whole(tmp_path: Path) -> None:
    """What reaches a worker's shell runs there as it was typed, its code and output kept."""
    words = [sys.executable, "-c", "import sys; print(sys.argv[1]); sys.exit(3)", "a 'b' $HOME"]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", worker_command(words, detach=False)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (3, "a 'b' $HOME\n")
    (log,) = (tmp_path / "popjax-logs").iterdir()
    assert log.read_text() == done.stdout


def test_a_detached_run_outlives_the_connection(tmp_path: Path) -> None:
    command = worker_command(["sh", "-c", "sleep 0.2; echo done"], detach=True)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, timeout=60)
    for _ in range(100):
        found = [log.read_text() for log in (tmp_path / "popjax-logs").iterdir()]
        if found == ["done\n"]:
            return
        time.sleep(0.1)
    raise AssertionError(found)


def test_the_first_code_that_is_not_zero_is_the_scripts(tpu_vm: Run) -> None:
    listing = "10.0.0.1\n10.0.0.2\n10.0.0.3"
    code, commands = tpu_vm(
        "run", "my-tpu", *OLDER, "--", "true", LISTING=listing, FAIL_ON="--worker=1"
    )
    assert code == 7
    assert len(commands) == 4, "the others ran all the same"


def test_logs_come_into_a_folder_a_worker(tpu_vm: Run, tmp_path: Path) -> None:
    to = tmp_path / "logs"
    code, commands = tpu_vm("logs", "my-tpu", *OLDER, "--to", str(to), LISTING="10.0.0.1\n10.0.0.2")
    assert code == 0
    assert sorted(path.name for path in to.iterdir()) == ["0", "1"]
    pulled = {flags(c)["--worker"]: c[5:7] for c in commands[1:]}
    assert pulled == {i: ["my-tpu:popjax-logs", str(to / i)] for i in ("0", "1")}
    code, (command,) = tpu_vm("logs", "my-tpu", *SINGLE, "--to", str(to))
    assert command[1:5] == ["scp", "--recurse", "my-tpu:popjax-logs", str(to / "my-tpu")]


def test_delete_takes_all_that_create_made(tpu_vm: Run) -> None:
    for place, created in ((SINGLE, 1), (OLDER, 1), (SLICE, 3)):
        code, commands = tpu_vm("delete", "my-tpu", *place)
        assert code == 0 and len(commands) == created
        assert all("--quiet" in command and "my-tpu" in command for command in commands)


def test_a_failure_stops_what_follows(tpu_vm: Run) -> None:
    code, commands = tpu_vm("create", "my-tpu", *SLICE, FAIL_ON="instance-templates")
    assert code == 7
    assert len(commands) == 2


def test_no_workers_is_an_error(tpu_vm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = tpu_vm("run", "my-tpu", *OLDER, "--", "true", LISTING="")
    assert code == 1 and "has no workers" in capsys.readouterr().err
    code, _ = tpu_vm("run", "my-tpu", *OLDER, "--", "true", FAIL_ON="describe")
    assert code == 1 and "exit code 7" in capsys.readouterr().err


def test_dry_run_prints_and_runs_nothing(
    tpu_vm: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "logs"
    for words in (["create"], ["run", "--", "true"], ["logs", "--to", str(to)], ["delete"]):
        code, commands = tpu_vm(words[0], "my-tpu", *SLICE, "--dry-run", *words[1:])
        printed = capsys.readouterr().out
        assert (code, commands) == (0, [])
        assert printed and all(line.startswith("gcloud ") for line in printed.splitlines())
    assert not to.exists()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name", "my tpu"),
        ("name", "-rf"),
        ("name", "tpu;reboot"),
        ("name", "$(id)"),
        ("name", "Tpu"),
        ("name", "tpu\n"),
        ("name", ""),
        ("zone", "us-east5-b;ls"),
        ("zone", "us-east5"),
        ("project", "x`id`-project"),
    ],
)
def test_odd_characters_are_refused(
    tpu_vm: Run, capsys: pytest.CaptureFixture[str], argument: str, value: str
) -> None:
    words: dict[str, Any] = {"name": "my-tpu", "zone": "us-east5-b", "project": "my-project"}
    words[argument] = value
    options = [f"--zone={words['zone']}", f"--project={words['project']}", "--target=v6e:2x2"]
    # A name that starts with a dash is an option to argparse, which refuses it by itself.
    if value == "-rf":
        with pytest.raises(SystemExit):
            tpu_vm("create", value, *options)
        return
    code, commands = tpu_vm("create", words["name"], *options)
    assert (code, commands) == (1, [])
    assert f"{argument} {value!r} is not" in capsys.readouterr().err


def test_a_command_is_for_run_alone(tpu_vm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for act in ("create", "logs", "delete"):
        assert tpu_vm(act, "my-tpu", *SINGLE, "--", "rm", "x") == (1, [])
        said = capsys.readouterr().err
        assert f"{act} takes no command, and '-- rm x' was given: drop it, or use run" in said


def test_targets_without_machines_are_refused(
    tpu_vm: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tpu_vm("create", "my-tpu", "--target", "v4:2x2x1", *PLACE)[0] == 1
    assert "use --api tpu-vm" in capsys.readouterr().err
    assert tpu_vm("create", "my-tpu", "--target", "v5p:1x1x1", *PLACE)[0] == 1
    assert "no v5p machine has 1 chip: take one with 4" in capsys.readouterr().err
    assert tpu_vm("create", "my-tpu", "--target", "v9:2x2", *PLACE)[0] == 1
    assert "names no known chip" in capsys.readouterr().err


def test_without_gcloud_the_error_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["create", "my-tpu", *SINGLE]) == 1
    assert "gcloud is not on PATH: install it from https://" in capsys.readouterr().err
    assert main(["create", "my-tpu", *SINGLE, "--dry-run"]) == 0


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.tpu_vm", "--help"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "fetch logs" in done.stdout
