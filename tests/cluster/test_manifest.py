"""The example for Kubernetes, against the schemas of those who read it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERNETES = "1.34"


@pytest.fixture
def manifest() -> dict[str, Any]:
    import yaml

    text = (REPOSITORY / "examples" / "rayservice.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def check(manifest: dict[str, Any]) -> None:
    import jsonschema
    import kubernetes_validate

    schema = json.loads(Path(__file__).with_name("rayservice.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(group["template"])}
        pod.setdefault("metadata", {"name": "checked"})
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_kubernetes_and_kuberay_take_it(manifest: dict[str, Any]) -> None:
    check(manifest)


@pytest.mark.parametrize("place", ["service", "group", "container"])
def test_a_misspelt_field_would_be_seen(manifest: dict[str, Any], place: str) -> None:
    group = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    container = group["template"]["spec"]["containers"][0]
    {"service": manifest["spec"], "group": group, "container": container}[place]["imagee"] = "x"
    with pytest.raises(Exception, match="imagee"):
        check(manifest)


def test_serve_takes_its_configuration(manifest: dict[str, Any]) -> None:
    pytest.importorskip("ray")
    import yaml
    from ray.serve.schema import ServeDeploySchema

    import dgemma.ray

    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    [found] = ServeDeploySchema.model_validate(config).applications
    assert found.import_path == "dgemma.ray:application"
    assert callable(dgemma.ray.application)
    settings = dgemma.ray.Settings.model_validate(found.args)
    assert settings.max_replicas == 4
    ports = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    named = {port["name"]: port["containerPort"] for port in ports["containers"][0]["ports"]}
    assert named["serve"] == config["http_options"]["port"]


def test_its_ray_is_the_pinned_one(manifest: dict[str, Any]) -> None:
    pytest.importorskip("ray")
    import ray

    wanted = manifest["spec"]["rayClusterConfig"]["rayVersion"].split(".")[:2]
    assert ray.__version__.split(".")[:2] == wanted
