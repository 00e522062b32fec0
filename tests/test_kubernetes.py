"""The KubeRay manifest, as far as it can be told without Kubernetes: Ray's own schema of what Ray Serve is to
deploy, and what a RayService must contain. KubeRay's own schema, which is no package, is asked where
RELAY_RAYSERVICE_CRD names its file."""

from __future__ import annotations

import importlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from relay_cluster.config import ClusterConfig

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray Serve's own

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "configs" / "k8s" / "rayservice.yml"
CRD = os.environ.get("RELAY_RAYSERVICE_CRD")
"""KubeRay's ray.io_rayservices.yaml, for who has it."""

SERVICE, POLICY = yaml.safe_load_all(MANIFEST.read_text("utf-8"))
CLUSTER: dict[str, Any] = SERVICE["spec"]["rayClusterConfig"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
SHAPE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "spec": {
            "type": "object",
            "required": ["serveConfigV2", "rayClusterConfig"],
            "additionalProperties": False,
            "properties": {
                "serveConfigV2": {"type": "string"},
                "rayClusterConfig": {
                    "type": "object",
                    "required": ["rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"],
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {
                            "required": ["mode", "secretName"],
                            "properties": {"mode": {"const": "token"}},
                        },
                        "headGroupSpec": {"$ref": "#/$defs/group"},
                        "workerGroupSpecs": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "allOf": [
                                    {"$ref": "#/$defs/group"},
                                    {"required": ["groupName", "replicas", "minReplicas", "maxReplicas"]},
                                ]
                            },
                        },
                    },
                },
            },
        },
    },
    "$defs": {
        "group": {
            "type": "object",
            "required": ["rayStartParams", "template"],
            "properties": {
                "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
                "template": {"type": "object", "required": ["metadata", "spec"]},
            },
        }
    },
}


def test_it_is_a_ray_service() -> None:
    jsonschema.validate(SERVICE, SHAPE)
    assert CLUSTER["rayVersion"] == metadata.version("ray"), "of constraints.txt"


@pytest.mark.parametrize("index", range(len(GROUPS)))
def test_pods_are_bounded_unprivileged_and_have_their_secrets(index: int) -> None:
    pod = GROUPS[index]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["keys"]["secret"]["secretName"] == "relay-api-keys"
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
    assert "env" not in container, "no secret in clear: KubeRay gives the token"


def test_ray_takes_what_serve_is_to_deploy() -> None:
    from ray.serve.schema import ServeDeploySchema

    told = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    (application,) = told.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    # As the image has it.
    file = Path(application.args["cluster"])
    config = ClusterConfig.load(ROOT / file.relative_to("/app"))
    assert config.ray.address == "auto"
    assert config.workers == CLUSTER["workerGroupSpecs"][0]["replicas"]
    assert config.serve.api_keys_file == "/etc/relay/keys.yaml"


def test_only_the_service_is_open_to_other_pods() -> None:
    mine = POLICY["spec"]["podSelector"]["matchLabels"]
    assert all(mine.items() <= g["template"]["metadata"]["labels"].items() for g in GROUPS)
    open_to_all = [rule for rule in POLICY["spec"]["ingress"] if "from" not in rule]
    assert [[p["port"] for p in rule["ports"]] for rule in open_to_all] == [[8000]]


@pytest.mark.skipif(not CRD, reason="RELAY_RAYSERVICE_CRD names no file")
def test_kuberays_own_schema_takes_it() -> None:
    crd = yaml.safe_load(Path(str(CRD)).read_text("utf-8"))
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = json.loads(json.dumps(version["schema"]["openAPIV3Schema"]))
    faults = [e.message for e in jsonschema.Draft4Validator(_closed(schema)).iter_errors(SERVICE)]
    assert faults == []


def _closed(schema: Any) -> Any:
    """As Kubernetes reads it: an object takes no field that it does not name, unless it says so."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _closed(value) for key, value in schema.items()}
    if out.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    free = out.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in out and isinstance(out["properties"], dict) and not free:
        out.setdefault("additionalProperties", False)
    return out
