"""The files in cluster/: by Ray's own schema, by KubeRay's, and by stricter rules of our own."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.util import fillout_defaults, validate_config

from lepton_ray import priority
from lepton_ray.errors import ClusterError
from lepton_ray.jobs import cluster_file, cluster_rules, embedded, proxy
from lepton_ray.jobs.prices import family

REPO = Path(__file__).parents[2]
CLUSTER = REPO / "cluster"
CONSTRAINTS = (REPO / "constraints.txt").read_text()
RAY_UP = ("aws", "gcp", "azure", "onprem")


def raw(name: str) -> dict[str, Any]:
    """A cluster file; of KubeRay's, the RayCluster in it."""
    documents = list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))
    found = [d for d in documents if d.get("kind", "RayCluster") == "RayCluster"]
    return copy.deepcopy(found[0])  # anchors would change everywhere at once


def problems(document: dict[str, Any]) -> list[str]:
    return cluster_rules.problems(cluster_file.parse([document], "file"), CONSTRAINTS)


@pytest.mark.parametrize("name", [*RAY_UP, "kuberay"])
def test_our_files_break_no_rule(name: str) -> None:
    assert problems(raw(name)) == []


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_itself_takes_them(name: str) -> None:
    validate_config(raw(name))
    if name != "onprem":
        filled = fillout_defaults(raw(name))
        given = raw(name)
        for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands"):
            assert filled[key] == given[key], "Ray's defaults install versions of their own"


def test_all_clusters_have_their_processes_load_the_same() -> None:
    for file in (CLUSTER / "node.sh", CLUSTER / "kuberay.yaml"):
        found = re.findall(r'RAY_preload_python_modules(?:=|, value: ")([\w.,]+)', file.read_text())
        assert found == list(embedded.PRELOAD.values()), file


def test_all_clusters_serve_alike() -> None:
    shell = 'for name in "$@"; do printf "%s\\n" "${!name}"; done'
    lines = (CLUSTER / "node.sh").read_text().splitlines()
    exports = [line for line in lines if line.startswith("export RAY_")]
    wanted = priority.RAY | proxy.EVERYWHERE
    asked = ["bash", "-c", "\n".join([*exports, shell]), "bash", *wanted]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == list(wanted.values())
    spec = raw("kuberay")["spec"]
    for pod in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        given = {e["name"]: e.get("value") for e in pod["template"]["spec"]["containers"][0]["env"]}
        assert wanted.items() <= given.items()


@pytest.mark.parametrize("name", [*RAY_UP, "kuberay"])
def test_every_key_has_its_comment(name: str) -> None:
    """The keys a person may change: those at the top and in the first two levels."""
    lines = (CLUSTER / f"{name}.yaml").read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        key = line.split(":")[0]
        if line and not line.startswith((" ", "#", "-")) and ":" in line:
            above = lines[number - 1] if number else ""
            near = lines[number + 1 : number + 4]
            told = above.startswith("#") or any(n.strip().startswith("#") for n in near)
            grouped = number and lines[number - 1].strip() and not above.startswith("#")
            plain = key in ("apiVersion", "kind", "metadata", "spec", "head_node_type", "provider")
            if not (told or grouped or plain):
                bare.append(line)
    assert not bare


def test_kuberay_holds_its_schema_strictly() -> None:
    packed = (REPO / "tests/crds/raycluster-v1.json.gz").read_bytes()
    schema = json.loads(gzip.decompress(packed))
    strict(schema)
    jsonschema.Draft7Validator(schema).validate(raw("kuberay"))
    wrong = raw("kuberay")
    wrong["spec"]["workerGroupSpecs"][0]["templat"] = {}
    with pytest.raises(jsonschema.ValidationError, match="templat"):
        jsonschema.Draft7Validator(schema).validate(wrong)


def strict(schema: Any) -> None:
    """No key that a schema does not name; KubeRay's own would be dropped in silence."""
    if isinstance(schema, list):
        for entry in schema:
            strict(entry)
    elif isinstance(schema, dict):
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
        if schema.get("type") == "object" and "properties" in schema and not open_ended:
            kind = {"apiVersion", "kind", "metadata"} <= schema["properties"].keys()
            schema.setdefault("additionalProperties", False)
            if kind:
                schema["properties"]["metadata"] = {"type": "object"}
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        for key, entry in schema.items():
            if key != "default":
                strict(entry)


def change(document: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split("/")
    for part in way:
        document = document[int(part) if part.isdigit() else part]  # type: ignore[index]
    if value is None:
        del document[last]
    else:
        document[last] = value


NODE = "available_node_types/cpu/node_config"


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("aws", f"{NODE}/SecurityGroupIds", None, "open port 22 to the whole world"),
        ("aws", "provider/security_group", {"GroupName": "0.0.0.0/0"}, "lets in the whole world"),
        ("aws", f"{NODE}/MetadataOptions", {"HttpTokens": "optional"}, "IMDSv2"),
        ("aws", f"{NODE}/BlockDeviceMappings", [{"Ebs": {"VolumeSize": 9}}], "Encrypted: true"),
        ("aws", f"{NODE}/IamInstanceProfile", None, "all of EC2 and S3"),
        ("aws", f"{NODE}/InstanceType", "c7g.2xlarge", "of 2 families (c7g, m6i)"),
        ("aws", f"{NODE}/InstanceMarketOptions", {"MarketType": "spot"}, "without the label"),
        ("aws", "available_node_types/head/resources", {"CPU": 2}, "the head must run no work"),
        ("aws", "available_node_types/cpu_spot/labels", {}, "without the label ray.io/market-type"),
        ("aws", "available_node_types/cpu_spot/max_workers", None, "limits what can be spent"),
        ("aws", "available_node_types/gpu_spot/node_config/InstanceType", "g5.xlarge", ""),
        ("aws", "setup_commands", ["export AWS_SECRET_ACCESS_KEY=abc"], "looks like a secret"),
        ("aws", "setup_commands", ["x=AKIAIOSFODNN7EXAMPLE"], "looks like a secret"),
        ("aws", "metadata/db", "postgresql://me:pw@host/mlflow", "looks like a secret"),
        ("aws", "setup_commands", ["pip install ray==2.9.0"], "pin it, ==2.60.0"),
        ("aws", "setup_commands", ["pip install -U 'boto3>=1.4.8'"], "pin it, ==1.44.8"),
        ("aws", "setup_commands", ["pip install boto3==1.44.8"], ""),
        ("aws", "docker", {"image": "rayproject/ray:2.9.0"}, "the image is of Ray 2.9.0"),
        ("aws", "head_setup_commands", None, "Ray would install what its defaults name"),
        ("aws", "head_start_ray_commands", ["ray start --head"], "starts without a token"),
        ("aws", "cluster_synced_files", [], "workers get no token"),
        ("aws", "provider/cache_stopped_nodes", True, "stopped machines cost their disks"),
        ("aws", "idle_timeout_minutes", None, "idle_timeout_minutes: missing"),
        ("gcp", f"{NODE}/networkInterfaces", None, "the default network lets in ssh"),
        ("gcp", f"{NODE}/minCpuPlatform", None, "one of two processors"),
        ("gcp", f"{NODE}/serviceAccounts", None, "may do too much"),
        ("azure", "provider/use_internal_ips", False, "opens port 22 to the world"),
        ("azure", "provider/msi_name", None, "owns the whole group"),
        ("onprem", "provider/worker_ips", ["192.168.0.10"], "is the head, which runs no work"),
        ("onprem", "max_workers", 3, "but there are 2 machines"),
        ("kuberay", "spec/authOptions", {"mode": "disabled"}, "must be {mode: token}"),
        ("kuberay", "spec/rayVersion", "2.59.0", "but constraints.txt has 2.60.0"),
        ("kuberay", "spec/headGroupSpec/rayStartParams", {}, "the head must run no work"),
        ("kuberay", "spec/workerGroupSpecs/1/labels", {}, ""),
    ],
)
def test_a_broken_rule_is_named(name: str, path: str, value: Any, said: str) -> None:
    document = raw(name)
    change(document, path, value)
    found = problems(document)
    assert any(said in line for line in found) if said else not found, found


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d.update(max_worker=3), "unknown key 'max_worker', did you mean 'max_workers'?"),
        (lambda d: d.update(max_workers="many"), "max_workers: 'many' is not of type 'integer'"),
        (lambda d: d.update(head_node_type="haed"), "did you mean 'head'?"),
        (
            lambda d: d["available_node_types"]["cpu"].update(min_worker=1),
            "available_node_types.cpu: unknown key 'min_worker', did you mean 'min_workers'?",
        ),
    ],
)
def test_a_typo_is_told_with_the_nearest_key(edit: Callable[[Any], None], said: str) -> None:
    document = raw("aws")
    edit(document)
    with pytest.raises(ClusterError) as caught:
        cluster_file.parse([document], "file")
    assert said in str(caught.value)


def test_what_is_no_cluster_file_is_refused(tmp_path: Path) -> None:
    for text, said in (("a: [", "not valid YAML"), ("- 1", "is no cluster file")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ClusterError, match=said):
            cluster_file.read(tmp_path / "x.yaml")
    with pytest.raises(ClusterError, match="cannot be read"):
        cluster_file.read(tmp_path / "none.yaml")


def test_the_family_of_a_machine_is_its_processor() -> None:
    names = ("m6i.2xlarge", "n2-standard-8", "Standard_D8as_v5", "Standard_NC4as_T4_v3")
    assert [family(n) for n in names] == ["m6i", "n2", "D-as_v5", "NC-as_T4_v3"]


def prepare():
    spec = importlib.util.spec_from_file_location("aws_prepare", CLUSTER / "aws_prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@mock_aws
def test_aws_prepare_makes_what_the_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    file = tmp_path / "aws.yaml"
    file.write_text((CLUSTER / "aws.yaml").read_text())
    asked = ["--bucket", "my-bucket", "--region", "eu-west-1", "--file", str(file)]
    prepare().main([*asked, "--ssh-from", "198.51.100.1/32"])
    prepare().main([*asked, "--ssh-from", "203.0.113.7/32"])  # and again, from elsewhere

    written = yaml.safe_load(file.read_text())
    assert "CHANGE-ME" not in file.read_text()
    assert written["provider"]["region"] == "eu-west-1"
    assert "LEPTON_STORAGE=s3://my-bucket/lepton" in written["setup_commands"][0]
    assert cluster_rules.problems(cluster_file.read(file), CONSTRAINTS) == []

    (group,) = written["available_node_types"]["cpu"]["node_config"]["SecurityGroupIds"]
    ec2 = boto3.client("ec2", region_name="eu-west-1")
    rules = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    outside = [r["CidrIp"] for rule in rules for r in rule["IpRanges"]]
    assert outside == ["203.0.113.7/32"], "the address of before may come no more"

    iam = boto3.client("iam")
    for kind in ("head", "worker"):
        name = f"lepton-ray-{kind}"
        policy = iam.get_role_policy(RoleName=name, PolicyName="lepton-ray")["PolicyDocument"]
        text = json.dumps(policy)
        assert "my-bucket" in text
        assert not {"REGION", "ACCOUNT", "CLUSTER", "BUCKET"} & set(
            text.replace(":", '"').split('"')
        )
        assert ("ec2:RunInstances" in text) == (kind == "head"), "workers start no machines"
        assert '"Action": "*"' not in text
    with pytest.raises(SystemExit):
        prepare().main([*asked, "--ssh-from", "0.0.0.0/0"])
