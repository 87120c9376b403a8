"""The manifest for Kubeflow, held to the structure of PyTorchJob, without a cluster.

The structure is that of the training operator's types (`pkg/apis/kubeflow.org/v1`: pytorch_types.go, common_types.go,
pytorch_validation.go) and of Kubernetes' core/v1, written down here as far as it is used: a key that is not here would
be dropped or refused by a cluster.
"""

import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitscale.errors import UserError
from vitscale.launch.kubeflow import Job, manifest
from vitscale.launch.node import for_operator
from vitscale.pipeline.config import Config
from vitscale.pipeline.recipe import load_recipe

SHIPPED = Path(__file__).parents[2] / "launch" / "recipes"
Command = Callable[..., subprocess.CompletedProcess[str]]

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T|m)?")
META = {"name": LABEL, "namespace?": LABEL}
RESOURCES = {"nvidia.com/gpu?": int, "cpu?": QUANTITY, "memory?": QUANTITY}
CONTAINER = {
    "name": LABEL,
    "image": str,
    "command": [str],
    "env": [{"name": str, "value": str}],
    "ports": [{"name": re.compile(r"[a-z0-9-]{1,15}"), "containerPort": int}],
    "resources": {"limits": RESOURCES, "requests": RESOURCES},
    "volumeMounts": [{"name": LABEL, "mountPath": re.compile(r"/[^:]*")}],
}
VOLUME = {
    "name": LABEL,
    "configMap?": {"name": LABEL},
    "emptyDir?": {"medium": re.compile("Memory"), "sizeLimit": QUANTITY},
    "persistentVolumeClaim?": {"claimName": LABEL},
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": re.compile("Always|OnFailure|Never|ExitCode"),
    "template": {
        "metadata": {"annotations": dict},
        "spec": {"terminationGracePeriodSeconds": int, "containers": [CONTAINER], "volumes": [VOLUME]},
    },
}
PYTORCH_JOB = {
    "apiVersion": re.compile(re.escape("kubeflow.org/v1")),
    "kind": re.compile("PyTorchJob"),
    "metadata": META,
    "spec": {
        "runPolicy": {
            "cleanPodPolicy": re.compile("All|Running|None"),
            "backoffLimit": int,
            "schedulingPolicy": {"minAvailable": int},
        },
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker?": REPLICAS},
    },
}
CONFIG_MAP = {
    "apiVersion": re.compile("v1"), "kind": re.compile("ConfigMap"), "metadata": META, "data": {"recipe.yaml": str},
}  # fmt: skip


def check(value: Any, schema: Any, where: str = "") -> None:
    """Assert that a value has the structure; keys with `?` may be missing, and no others may be there."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        known = {key.rstrip("?"): each for key, each in schema.items()}
        assert set(value) <= set(known), f"{where}: {set(value) - set(known)}"
        assert {key for key in schema if not key.endswith("?")} <= set(value), where
        for key, each in value.items():
            check(each, known[key], f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for i, each in enumerate(value):
            check(each, schema[0], f"{where}[{i}]")
    elif isinstance(schema, re.Pattern):
        assert isinstance(value, str), where
        assert schema.fullmatch(value), f"{where}: {value}"
    else:
        assert isinstance(value, schema), where
        assert not (schema is int and isinstance(value, bool)), where


def recipe(*overrides: str) -> Config:
    return load_recipe("vit-l16-i21k-pretrain", ["data.train=/data/train", "run.dir=/runs/a", *overrides], SHIPPED)


@pytest.mark.parametrize("nodes", [1, 8])
@pytest.mark.parametrize("gpus", [0, 8])
def test_the_structure_is_that_of_a_pytorchjob(nodes: int, gpus: int) -> None:
    volumes = ["data:/data", "data:/more", "results:/runs"]
    job = Job("l16", "vitscale:1", nodes, gpus, "research", volumes, cpus="96", memory="900Gi", restarts=7)
    settings, made = yaml.safe_load_all(manifest(recipe(), job))
    check(settings, CONFIG_MAP)
    check(made, PYTORCH_JOB)
    specs = made["spec"]["pytorchReplicaSpecs"]
    assert sum(spec["replicas"] for spec in specs.values()) == nodes
    assert specs["Master"]["replicas"] == 1, "the operator refuses more"
    assert ("Worker" in specs) == (nodes > 1)
    for spec in specs.values():
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the operator adds the rendezvous to this one"
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert len(volumes) == len(pod["volumes"]), "names are unique"
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert len({mount["mountPath"] for mount in container["volumeMounts"]}) == len(container["volumeMounts"])
        hosts = container["env"][0]["value"].split(",")
        assert hosts[0] == f"l16-master-0:{max(gpus, 1)}"
        assert hosts[1:] == [f"l16-worker-{i}:{max(gpus, 1)}" for i in range(nodes - 1)]
    assert made["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == nodes


def test_the_recipe_travels_with_it_as_it_resolves(tmp_path: Path) -> None:
    config = recipe("optim.lr=5e-4")
    settings, made = yaml.safe_load_all(manifest(config, Job("a", "i", volumes=["d:/data", "r:/runs"])))
    (tmp_path / "recipe.yaml").write_text(settings["data"]["recipe.yaml"])
    assert load_recipe(str(tmp_path / "recipe.yaml"), [], SHIPPED) == config
    pod = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert command == ["vitscale", "launch", "node", "--operator", "pretrain", "/etc/vitscale/recipe.yaml"]
    _, tuned = yaml.safe_load_all(manifest(recipe("init_from=/runs/a"), Job("a", "i", volumes=["d:/data", "r:/runs"])))
    pod = tuned["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert "finetune" in pod["containers"][0]["command"]


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"name": "L16"}, "--name"),
        ({"name": "a" * 46}, "--name"),
        ({"image": ""}, "--image"),
        ({"nodes": 0}, "--nodes"),
        ({"gpus": -1}, "--gpus"),
        ({"volumes": ["data"]}, "--volume"),
        ({"volumes": ["data:/data"]}, "run.dir"),
        ({"volumes": ["data:/dat", "runs:/runs"]}, "data.train"),
    ],
)
def test_refusals(change: dict[str, Any], setting: str) -> None:
    good = {"name": "a", "image": "i", "volumes": ["d:/data", "r:/runs"]}
    with pytest.raises(UserError) as error:
        manifest(recipe(), Job(**{**good, **change}))
    assert error.value.setting == setting


def test_exit_codes_say_to_the_operator_what_is_final() -> None:
    """restartPolicy ExitCode: 1 to 127 are permanent, 128 to 255 are tried again."""
    assert [for_operator(code) for code in (0, 2)] == [0, 2]
    assert all(128 <= for_operator(code) <= 255 for code in (1, 75, 76, 130))


def test_the_command_prints_a_manifest(vitscale: Command) -> None:
    words = ("vit-s16-i1k-90ep", "data.train=s3://bucket/train", "run.dir=/runs/a", "--image", "vitscale:1")
    said = vitscale("launch", "kubeflow", *words, "--volume", "runs:/runs", "--nodes", 2, "--dry-run")
    assert said.returncode == 0, said.stderr
    settings, made = yaml.safe_load_all(said.stdout)
    check(settings, CONFIG_MAP)
    check(made, PYTORCH_JOB)
    assert made["metadata"]["name"] == "vit-s16-i1k-90ep"
    assert said.stdout.startswith("# vit-s16-i1k-90ep: 2 pods of 8 GPUs, ")


def test_what_a_pod_does(vitscale: Command) -> None:
    """The command of the manifest with the operator's variables: ranks take their places, codes say what is final."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pod = {"VITSCALE_HOSTS": "a-master-0:2", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    words = ("launch", "node", "--operator", "doctor")
    said = vitscale(*words, "data.train=nowhere", env={**pod, "MASTER_PORT": port})
    assert said.returncode == 128 + 1, said.stderr
    assert "data not readable" in said.stdout
    assert [row.split()[0] for row in said.stdout.splitlines()[:3]] == ["rank", "0", "1"]
    wrong = vitscale(*words, "data.trian=nowhere", env={**pod, "MASTER_PORT": port})
    assert wrong.returncode == 2
    outside = vitscale(*words)
    assert outside.returncode == 2
    assert outside.stderr.startswith("error: environment: got no VITSCALE_HOSTS and no RANK")
