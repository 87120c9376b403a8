"""A run as a PyTorchJob of Kubeflow's training operator (kubeflow.org/v1): one pod a node, all of its GPUs in it.

The operator gives each pod RANK, its number, and MASTER_ADDR and MASTER_PORT, those of pod 0; `vitscale launch node`
starts the ranks. torchrun would end them 30 s after the SIGTERM of an eviction, while they may be saving still.
"""

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from vitscale.errors import UserError
from vitscale.launch.node import HOSTS, written
from vitscale.pipeline.config import Config, require
from vitscale.pipeline.recipe import to_yaml

PORT = 23456  # what the operator calls pytorchjob-port
RECIPE = "/etc/vitscale/recipe.yaml"
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, as the operator asks for
HEAD = """\
# {name}: {nodes} of {slots}, by Kubeflow's training operator (kubeflow.org/v1 PyTorchJob).
#
#   kubectl create -f FILE
#   kubectl get pytorchjob {name}
#   kubectl logs -f {name}-master-0
#
# - The ConfigMap holds the resolved recipe, every setting of it.
# - restartPolicy ExitCode: pods that saved after a signal, hung or were killed end with 128 or more, are made anew and
#   go on from the last checkpoint; a wrong setting (2) ends the job. backoffLimit bounds how often.
# - terminationGracePeriodSeconds is what a step and a save may take after an eviction's SIGTERM.
# - /dev/shm is memory, counted as the pod's: loader processes hand images over in it. A container's own has 64 MB.
# - minAvailable is for a gang scheduler (Volcano, Kueue, scheduler-plugins): all pods, or none.
# - Add what the cluster wants to pods: nodeSelector, tolerations, priorityClassName, annotations of its network.
"""


@dataclass(frozen=True)
class Job:
    """A PyTorchJob: `nodes` pods of `gpus` GPUs each (0: one rank on CPUs), and what pods get.

    `volumes`: `CLAIM:/path` of persistent volume claims. `shm_gb` of /dev/shm. `cpus` and `memory` (`900Gi`) are left
    to the cluster's defaults if empty. `grace`: seconds to save after an eviction. `restarts` in all.
    """

    name: str
    image: str
    nodes: int = 1
    gpus: int = 8
    namespace: str = ""
    volumes: list[str] = field(default_factory=list)
    shm_gb: float = 16.0
    cpus: str = ""
    memory: str = ""
    grace: int = 600
    restarts: int = 100

    def __post_init__(self) -> None:
        fits = NAME.fullmatch(self.name) and len(self.name) <= 45  # names of pods and services are longer
        remedy = "Lower-case letters, digits and hyphens, such as l16-pretrain."
        require(bool(fits), "--name", repr(self.name), "at most 45 characters of a DNS label", remedy)
        require(bool(self.image), "--image", "nothing", "an image with vitscale in it", "Add --image NAME.")
        require(self.nodes > 0, "--nodes", self.nodes, "at least 1", "Leave it out for one.")
        require(self.gpus >= 0, "--gpus", self.gpus, "at least 0", "0 trains on CPUs.")
        for volume in self.volumes:
            claim, _, path = volume.partition(":")
            require(
                bool(claim) and path.startswith("/"), "--volume", repr(volume), "CLAIM:/PATH", "Such as data:/data."
            )

    @property
    def slots(self) -> int:
        """Ranks of a pod."""
        return max(self.gpus, 1)

    @property
    def hosts(self) -> list[tuple[str, int]]:
        """Pods by their names, in the order of their numbers, and their ranks."""
        names = ["master-0", *(f"worker-{i}" for i in range(self.nodes - 1))]
        return [(f"{self.name}-{name}", self.slots) for name in names]


def check_paths(config: Config, job: Job) -> None:
    """Raise `UserError` for data and a run that are on none of the volumes, and would not be there or be lost."""
    mounts = [volume.partition(":")[2] for volume in job.volumes]
    datasets = [("data.train", path) for path, _ in config.data.mixture]
    for setting, path in [("run.dir", config.run.dir), *datasets, ("data.val", config.data.val)]:
        if setting != "data.val":
            require(bool(path), setting, "nothing", "a folder on a volume, or a URL", f"Add {setting}=PATH.")
        held = "://" in path or any(PurePosixPath(path).is_relative_to(mount) for mount in mounts)
        if path and not held:
            remedy = "Add --volume CLAIM:/PATH for where it is."
            raise UserError(setting, path, f"a URL, or a path within {', '.join(mounts) or 'a --volume'}", remedy)


def objects(config: Config, job: Job) -> list[dict[str, Any]]:
    """The ConfigMap with the recipe, and the PyTorchJob."""
    meta = {"name": job.name, **({"namespace": job.namespace} if job.namespace else {})}
    recipe = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"recipe.yaml": to_yaml(config)}}
    spec: dict[str, Any] = {
        "runPolicy": {
            "cleanPodPolicy": "None",  # logs stay until the job is deleted
            "backoffLimit": job.restarts,
            "schedulingPolicy": {"minAvailable": job.nodes},
        },
        "pytorchReplicaSpecs": {"Master": _replicas(config, job, 1)},
    }
    if job.nodes > 1:
        spec["pytorchReplicaSpecs"]["Worker"] = _replicas(config, job, job.nodes - 1)
    return [recipe, {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": meta, "spec": spec}]


def manifest(config: Config, job: Job) -> str:
    """Both as YAML, with what there is to know at its head. Raises `UserError` as `check_paths` does."""
    check_paths(config, job)
    slots = f"{job.gpus} GPU{'s' * (job.gpus != 1)}" if job.gpus else "one rank on CPUs"
    head = HEAD.format(name=job.name, nodes=f"{job.nodes} pod{'s' * (job.nodes > 1)}", slots=slots)
    return head + "---\n".join(yaml.dump(each, Dumper=_Dumper, sort_keys=False) for each in objects(config, job))


class _Dumper(yaml.SafeDumper):
    """Writes what occurs twice twice, and texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _replicas(config: Config, job: Job, count: int) -> dict[str, Any]:
    stage = "finetune" if config.init_from else "pretrain"
    limits = {"nvidia.com/gpu": job.gpus} if job.gpus else {}
    limits |= {name: value for name, value in (("cpu", job.cpus), ("memory", job.memory)) if value}
    mounts = [volume.split(":", 1) for volume in job.volumes]
    claims = dict.fromkeys(claim for claim, _ in mounts)
    container = {
        "name": "pytorch",  # the operator knows it by this name
        "image": job.image,
        "command": ["vitscale", "launch", "node", "--operator", stage, RECIPE],
        "env": [{"name": HOSTS, "value": written(job.hosts)}],
        "ports": [{"name": "pytorchjob-port", "containerPort": PORT}],
        "resources": {"limits": limits, "requests": limits},
        "volumeMounts": [
            {"name": "recipe", "mountPath": str(PurePosixPath(RECIPE).parent)},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": f"claim-{claim}", "mountPath": path} for claim, path in mounts),
        ],
    }
    pod = {
        "terminationGracePeriodSeconds": job.grace,
        "containers": [container],
        "volumes": [
            {"name": "recipe", "configMap": {"name": job.name}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{job.shm_gb:g}G"}},
            *({"name": f"claim-{claim}", "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
        ],
    }
    # a service mesh's proxy would stand between ranks, and never end
    annotations = {"sidecar.istio.io/inject": "false"}
    template = {"metadata": {"annotations": annotations}, "spec": pod}
    return {"replicas": count, "restartPolicy": "ExitCode", "template": template}
