"""gcp.yaml and azure.yaml through Ray's own providers and the clouds' own libraries, with answers
in place of a network: what `ray up` asks for, and whether that is what the files and roles say.

Not shown: that a cloud answers so. Bodies are held to the published descriptions of the interfaces.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

REPO = Path(__file__).parents[2]
CLUSTER = REPO / "cluster"
PROJECT = "a-project"
SUBSCRIPTION = "00000000-0000-0000-0000-000000000001"

Answer = tuple[int, dict[str, Any]]
Asked = tuple[str, str, dict[str, Any]]  # method, URL without its query, body


def file(name: str) -> dict[str, Any]:
    """A cluster file with its placeholders filled in."""
    text = (CLUSTER / f"{name}.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(re.sub("CHANGE-?ME", PROJECT, text))
    return found


def tags(cluster: dict[str, Any], kind: str) -> dict[str, str]:
    """As Ray gives them to a new machine."""
    role = "head" if kind == cluster["head_node_type"] else "worker"
    return {
        "ray-node-type": role,
        "ray-user-node-type": kind,
        "ray-node-name": f"ray-{cluster['cluster_name']}-{role}",
        "ray-node-status": "uninitialized",
        "ray-launch-config": "0",
    }


# --- Compute Engine -------------------------------------------------------------------------------


class Google:
    """Answers of four interfaces; machines that were made are there."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.machines: dict[str, dict[str, Any]] = {}

    def answer(self, method: str, url: str, body: dict[str, Any]) -> Answer:
        path = re.sub(r"^https://[^/]+", "", url).partition("?")[0]
        self.asked.append((method, path, body))
        match method, path.rpartition("/")[2]:
            case "POST", "instances":
                self.machines[body["name"]] = {**body, "status": "RUNNING", "labelFingerprint": "x"}
                return 200, {"name": "operation"}
            case "GET", "instances":
                return 200, {"items": list(self.machines.values())}
            case "DELETE", name:
                del self.machines[name]
                return 200, {"name": "operation"}
            case "GET", "operation":
                return 200, {"status": "DONE"}
            case "POST", "setLabels":
                self.machines[path.split("/")[-2]]["labels"] = body["labels"]
                return 200, {"name": "operation"}
        known: dict[str, Answer] = {
            f"GET /v1/projects/{PROJECT}": (
                200, {"projectId": PROJECT, "lifecycleState": "ACTIVE"}
            ),
            f"GET /compute/v1/projects/{PROJECT}": (
                200, {"name": PROJECT, "commonInstanceMetadata": {}}
            ),
            f"POST /compute/v1/projects/{PROJECT}/setCommonInstanceMetadata": (
                200, {"name": "operation"}
            ),
            f"POST /v1/projects/{PROJECT}:getIamPolicy": (200, {"bindings": []}),
            f"POST /v1/projects/{PROJECT}:setIamPolicy": (200, {}),
            f"POST /v1/projects/{PROJECT}/serviceAccounts": (
                200, {"projectId": PROJECT, "email": "of-ray@x"}
            ),
        }  # fmt: skip
        return known.get(f"{method} {path}", (404, {}))


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Google:
    httplib2 = pytest.importorskip("httplib2")
    import google.auth
    import google.oauth2.credentials

    made = Google()

    def request(
        _: Any, uri: str, method: str = "GET", body: Any = None, *__: Any, **___: Any
    ) -> tuple[Any, bytes]:
        status, answer = made.answer(method, uri, json.loads(body) if body else {})
        return httplib2.Response({"status": str(status)}), json.dumps(answer).encode()

    credentials = google.oauth2.credentials.Credentials("a-token")  # type: ignore[no-untyped-call]
    monkeypatch.setattr(google.auth, "default", lambda *_, **__: (credentials, PROJECT))
    monkeypatch.setattr(httplib2.Http, "request", request)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray makes a key
    return made


def unknown_fields(name: str, value: Any, schemas: dict[str, Any]) -> list[str]:
    """What a body has that the interface's published description has not."""
    if isinstance(value, list):
        return [problem for one in value for problem in unknown_fields(name, one, schemas)]
    if not isinstance(value, dict):
        return []
    fields = schemas[name].get("properties", {})
    problems = [f"{name}.{key}" for key in value if key not in fields]
    for key, inner in value.items():
        of = fields.get(key, {})
        reference = of.get("$ref") or of.get("items", {}).get("$ref")
        if reference:
            problems += unknown_fields(reference, inner, schemas)
    return problems


def test_google_is_asked_for_the_machines_of_the_file(google: Google, tmp_path: Path) -> None:
    from googleapiclient.discovery_cache import get_static_doc
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

    cluster = GCPNodeProvider.bootstrap_config(file("gcp"))
    key = Path(cluster["auth"]["ssh_private_key"])
    assert key.is_relative_to(tmp_path)
    assert key.stat().st_mode & 0o777 == 0o600
    assert not [a for a in google.asked if "subnetworks" in a[1]], "the network is ours"

    google.asked.clear()
    provider = GCPNodeProvider(cluster["provider"], cluster["cluster_name"])
    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    accounts = {
        "head": f"lepton-ray-head@{PROJECT}.iam.gserviceaccount.com",
        "worker": f"lepton-ray-worker@{PROJECT}.iam.gserviceaccount.com",
    }
    for kind, settings in cluster["available_node_types"].items():
        labels = tags(cluster, kind)
        (name,) = provider.create_node(settings["node_config"], labels, 1)
        body = google.machines[name]
        sent = {k: v for k, v in body.items() if k not in ("status",)}
        assert unknown_fields("Instance", sent, schemas) == []
        (account,) = body["serviceAccounts"]
        assert account["email"] == accounts[labels["ray-node-type"]], "not the one that Ray makes"
        (interface,) = body["networkInterfaces"]
        assert interface["subnetwork"].endswith("/subnetworks/lepton-ray")
        spot = body.get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert spot == (settings.get("labels") == {"ray.io/market-type": "spot"})
        assert body["disks"][0]["autoDelete"]
    found = provider.non_terminated_nodes({})
    assert len(found) == len(cluster["available_node_types"])
    provider.set_node_tags(found[0], {"ray-node-status": "up-to-date"})
    for name in found:
        provider.terminate_node(name)
    assert provider.non_terminated_nodes({}) == []

    allowed = yaml.safe_load((CLUSTER / "iam/gcp-head.yaml").read_text())["includedPermissions"]
    needed = {permission(method, path) for method, path, _ in google.asked}
    assert needed <= set(allowed), "what the head does is in its role"


def permission(method: str, path: str) -> str:
    """Of a call on machines."""
    last = path.rpartition("/")[2]
    if "/operations/" in path:
        return "compute.zoneOperations.get"
    verbs = {"POST": "create", "DELETE": "delete", "GET": "list" if last == "instances" else "get"}
    return f"compute.instances.{last if last.startswith('set') else verbs[method]}"


def test_ray_makes_an_account_of_its_own_that_no_machine_has(google: Google) -> None:
    """Said in docs/cluster.md, because its roles are wide: whoever calls `ray up` must know."""
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

    GCPNodeProvider.bootstrap_config(file("gcp"))
    (body,) = (body for _, path, body in google.asked if path.endswith(":setIamPolicy"))
    given = {binding["role"] for binding in body["policy"]["bindings"]}
    told = (REPO / "docs/cluster.md").read_text()
    assert given
    assert all(f"`{role}`" in told for role in given), given


# --- Azure ----------------------------------------------------------------------------------------


class Azure:
    """Answers of the resource manager."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def answer(self, method: str, url: str, body: dict[str, Any]) -> Answer:
        path = re.sub(r"^https://[^/]+", "", url).partition("?")[0]
        self.asked.append((method, path, body))
        if "/deployments/" in path:
            outputs = {name: {"value": f"/{name}"} for name in ("msi", "nsg", "subnet")}
            return 200, {"properties": {"provisioningState": "Succeeded", "outputs": outputs}}
        return 200, {"value": []} if method == "GET" else {}


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Azure:
    identity = pytest.importorskip("azure.identity")
    import requests
    from azure.core.credentials import AccessTokenInfo
    from ray.autoscaler._private._azure import node_provider

    made = Azure()

    def request(_: Any, method: str, url: str, *__: Any, **given: Any) -> requests.Response:
        body = given.get("data")
        status, answer = made.answer(method, url, json.loads(body) if body else {})
        response = requests.Response()
        response.status_code = status
        content = io.BytesIO(json.dumps(answer).encode())
        response.raw = urllib3.HTTPResponse(content, preload_content=False)
        response.headers["content-type"] = "application/json"
        return response

    monkeypatch.setattr(requests.Session, "request", request)
    for kind in (identity.AzureCliCredential, identity.DefaultAzureCredential):
        token = AccessTokenInfo("a-token", 2**31)
        monkeypatch.setattr(kind, "get_token_info", lambda *_, token=token, **__: token)
    monkeypatch.setattr(node_provider, "get_cloud_from_metadata_requests", lambda: "unknown")
    monkeypatch.setenv("HOME", str(tmp_path))
    return made


def deployed(azure: Azure) -> tuple[dict[str, Any], dict[str, Any]]:
    """Template and parameters of the last deployment."""
    (*_, body) = (body for method, path, body in azure.asked if method == "PUT" and
                  "/deployments/" in path)  # fmt: skip
    given = body["properties"]
    return given["template"], {k: v["value"] for k, v in given["parameters"].items()}


def test_azure_is_asked_for_the_machines_of_the_file(azure: Azure) -> None:
    from ray.autoscaler._private._azure.node_provider import AzureNodeProvider

    cluster = file("azure")
    cluster["provider"]["subscription_id"] = SUBSCRIPTION  # else `az login` says it
    cluster = AzureNodeProvider.bootstrap_config(cluster)
    template, given = deployed(azure)
    assert given["createMsi"] is False, "the identity is ours, with our role"
    assert given["msiName"] == "lepton-ray"
    rules = [
        rule["properties"]
        for resource in template["resources"]
        if resource["type"] == "Microsoft.Network/networkSecurityGroups"
        for rule in resource["properties"]["securityRules"]
    ]
    assert any(r["sourceAddressPrefix"] == "*" and r["access"] == "Allow" for r in rules), (
        "Ray's rule is not open any more: say so in azure.yaml, and take public addresses"
    )

    provider = AzureNodeProvider(cluster["provider"], cluster["cluster_name"])
    for kind, settings in cluster["available_node_types"].items():
        provider.create_node(settings["node_config"], tags(cluster, kind), 1)
        template, given = deployed(azure)
        assert given.keys() <= template["parameters"].keys(), "the template takes no others"
        required = {n for n, p in template["parameters"].items() if "defaultValue" not in p}
        assert required <= given.keys()
        assert given["provisionPublicIp"] is False, "the world does not reach it"
        assert given["msi"] == "/msi"
        spot = given.get("priority") == "Spot"
        assert spot == (settings.get("labels") == {"ray.io/market-type": "spot"})


def test_the_checks_would_see_a_wrong_file(google: Google) -> None:
    from googleapiclient.discovery_cache import get_static_doc

    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    wrong = {"machineType": "x", "scheduling": {"provisionModel": "SPOT"}, "labls": {}}
    assert unknown_fields("Instance", wrong, schemas) == [
        "Instance.labls",
        "Scheduling.provisionModel",
    ]
