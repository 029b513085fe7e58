"""The gcloud commands for machines with TPUs, through both of Google's APIs.

`ComputeEngine` (v5e, v5p, v6e as ordinary instances; several hosts as a managed group) and `TpuVm`
(the older API, all kinds). Both only build argument lists; `__main__.py` runs or prints them.
"""

from __future__ import annotations

import dataclasses

from popjax.targets import Target
from scripts.tpu_vm.machines import (
    CHIPS,
    IMAGE_FAMILY,
    IMAGE_PROJECT,
    accelerator_type,
    checked,
    machine,
)

Command = list[str]
# The images come with 10 GB, which an environment and one small model already fill.
DISK = "200GB"


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """The older Cloud TPU API: one resource, however many hosts."""

    name: str
    zone: str
    target: Target
    project: str | None = None

    def _gcloud(self, verb: str, *words: str) -> Command:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *words, *_place(self)]

    def create(self, spot: bool) -> list[Command]:
        words = [
            f"--accelerator-type={accelerator_type(self.target)}",
            f"--version={CHIPS[self.target.chip.name].runtime}",
        ]
        return [self._gcloud("create", self.name, *words, *(["--spot"] if spot else []))]

    def delete(self) -> list[Command]:
        return [self._gcloud("delete", self.name, "--quiet")]

    def workers(self) -> Command | None:
        """The command that prints one line a worker."""
        flags = ("--flatten=networkEndpoints[]", "--format=value(networkEndpoints.ipAddress)")
        return self._gcloud("describe", self.name, *flags)

    def named(self, listing: str) -> list[str]:
        """The workers of such a listing, as the other commands call them: by their numbers."""
        return [str(i) for i, _ in enumerate(listing.split())]

    def ssh(self, worker: str, command: str) -> Command:
        return self._gcloud("ssh", self.name, f"--worker={worker}", f"--command={command}")

    def upload(self, worker: str, file: str) -> Command:
        return self._gcloud("scp", file, f"{self.name}:", f"--worker={worker}")

    def download(self, worker: str, folder: str, to: str) -> Command:
        return self._gcloud("scp", "--recurse", f"{self.name}:{folder}", to, f"--worker={worker}")


@dataclasses.dataclass(frozen=True)
class ComputeEngine:
    """The Compute Engine API: an instance, or for several hosts a managed group in one slice."""

    name: str
    zone: str
    target: Target
    project: str | None = None

    def _gcloud(self, *words: str, region: bool = False) -> Command:
        return ["gcloud", "compute", *words, *_place(self, region)]

    @property
    def _alone(self) -> bool:
        return machine(self.target)[1] == 1

    def create(self, spot: bool) -> list[Command]:
        kind, hosts = machine(self.target)
        flags = [
            f"--machine-type={kind}",
            f"--image-family={IMAGE_FAMILY}",
            f"--image-project={IMAGE_PROJECT}",
            f"--boot-disk-size={DISK}",
            "--maintenance-policy=TERMINATE",
            "--scopes=cloud-platform",
        ]
        if spot:
            flags += ["--provisioning-model=SPOT", "--instance-termination-action=DELETE"]
        if hosts == 1:
            return [self._gcloud("instances", "create", self.name, *flags)]
        return self._create_slice(flags, hosts)

    def _create_slice(self, flags: list[str], hosts: int) -> list[Command]:
        """A policy that wires the chips, a template, a group of that size; sized all at once."""
        policy = [
            "--type=HIGH_THROUGHPUT",
            f"--accelerator-topology={self.target.topology}",
            "--accelerator-topology-mode=AUTO_CONNECT",
        ]
        group = [
            "--size=0",
            f"--template={self._resource('instanceTemplates')}",
            f"--workload-policy={self._resource('resourcePolicies')}",
            "--target-size-policy-mode=bulk",
            "--default-action-on-vm-failure=do-nothing",
        ]
        template = ["instance-templates", "create", self.name, *flags]
        template += [f"--instance-template-region={self._region}"]
        managed = ("instance-groups", "managed")
        return [
            self._gcloud(
                *("resource-policies", "create", "workload-policy", self.name),
                *policy,
                region=True,
            ),
            ["gcloud", "compute", *template, *_project(self)],
            self._gcloud(*managed, "create", self.name, *group),
            self._gcloud(*managed, "resize", self.name, f"--size={hosts}"),
        ]

    @property
    def _region(self) -> str:
        return self.zone.rpartition("-")[0]

    def _resource(self, kind: str) -> str:
        if self.project is None:
            raise ValueError(
                f"{self.target} takes several hosts, whose group needs the project's id: "
                "give --project"
            )
        return f"projects/{self.project}/regions/{self._region}/{kind}/{self.name}"

    def delete(self) -> list[Command]:
        if self._alone:
            return [self._gcloud("instances", "delete", self.name, "--quiet")]
        template = ("instance-templates", "delete", self.name, f"--region={self._region}")
        return [
            self._gcloud("instance-groups", "managed", "delete", self.name, "--quiet"),
            ["gcloud", "compute", *template, "--quiet", *_project(self)],
            self._gcloud("resource-policies", "delete", self.name, "--quiet", region=True),
        ]

    def workers(self) -> Command | None:
        """The command that prints one line a worker; None where there is one, of a known name."""
        if self._alone:
            return None
        listing = ("list-instances", self.name, "--format=value(instance.basename())")
        return self._gcloud("instance-groups", "managed", *listing)

    def named(self, listing: str) -> list[str]:
        """The workers of such a listing, as the other commands call them: by their names."""
        return [checked("name", word) for word in listing.split()] if listing else [self.name]

    def ssh(self, worker: str, command: str) -> Command:
        return self._gcloud("ssh", worker, f"--command={command}")

    def upload(self, worker: str, file: str) -> Command:
        return self._gcloud("scp", file, f"{worker}:")

    def download(self, worker: str, folder: str, to: str) -> Command:
        return self._gcloud("scp", "--recurse", f"{worker}:{folder}", to)


Cloud = TpuVm | ComputeEngine
CLOUDS: dict[str, type[Cloud]] = {"compute": ComputeEngine, "tpu-vm": TpuVm}


def _project(cloud: Cloud) -> Command:
    return [f"--project={cloud.project}"] if cloud.project else []


def _place(cloud: Cloud, region: bool = False) -> Command:
    place = f"--region={cloud.zone.rpartition('-')[0]}" if region else f"--zone={cloud.zone}"
    return [place, *_project(cloud)]
