"""Make what cluster/aws.yaml names: bucket, roles, security group; write their names into it.

    python cluster/aws_prepare.py --bucket my-lepton --ssh-from 203.0.113.7/32

Needs boto3 and the credentials of somebody who may make roles. Run it again after a change: what is
there stays, and is brought to what the files here say.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import re
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

HERE = Path(__file__).parent
GROUP = "lepton-ray"
ROLES = {"lepton-ray-head": "aws-head.json", "lepton-ray-worker": "aws-worker.json"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="make what cluster/aws.yaml names")
    parser.add_argument("--bucket", required=True, help="its name, unique in the world")
    parser.add_argument(
        "--ssh-from", required=True, type=network, help="your address, as N.N.N.N/32"
    )
    parser.add_argument("--region", default="us-west-2")
    parser.add_argument("--cluster", default="lepton", help="cluster_name in the file")
    parser.add_argument(
        "--file", type=Path, default=HERE / "aws.yaml", help="where to write the names"
    )
    options = parser.parse_args(arguments)
    account = boto3.client("sts", region_name=options.region).get_caller_identity()["Account"]
    values = {
        "REGION": options.region,
        "ACCOUNT": account,
        "CLUSTER": options.cluster,
        "BUCKET": options.bucket,
    }
    make_bucket(options.bucket, options.region)
    for role, policy in ROLES.items():
        make_role(role, filled(policy, values))
    group = make_group(options.region, options.ssh_from)
    options.file.write_text(named(options.file.read_text(), options.region, options.bucket, group))
    print(
        f"wrote {options.file}: s3://{options.bucket}/lepton, {group}; now: ray up {options.file}"
    )


def network(text: str) -> str:
    """An address range that is not the whole world."""
    found = ipaddress.ip_network(text)
    if found.prefixlen < 8:
        raise argparse.ArgumentTypeError(f"{text} lets in the world: name your own address, /32")
    return str(found)


def filled(policy: str, values: dict[str, str]) -> str:
    """A policy file with the names of this account in it."""
    text = (HERE / "iam" / policy).read_text()
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def make_bucket(name: str, region: str) -> None:
    s3 = boto3.client("s3", region_name=region)
    where = {} if region == "us-east-1" else {"LocationConstraint": region}
    try:
        s3.create_bucket(Bucket=name, **({"CreateBucketConfiguration": where} if where else {}))
    except ClientError as error:
        if error.response["Error"]["Code"] != "BucketAlreadyOwnedByYou":
            raise
    s3.put_public_access_block(
        Bucket=name,
        PublicAccessBlockConfiguration={
            "BlockPublicAcls": True,
            "IgnorePublicAcls": True,
            "BlockPublicPolicy": True,
            "RestrictPublicBuckets": True,
        },
    )


def make_role(name: str, policy: str) -> None:
    """A role and the instance profile of its name, with this policy and no other of ours."""
    iam = boto3.client("iam")
    with there_already():
        iam.create_role(
            RoleName=name, AssumeRolePolicyDocument=(HERE / "iam/aws-trust.json").read_text()
        )
    iam.put_role_policy(RoleName=name, PolicyName="lepton-ray", PolicyDocument=policy)
    with there_already():
        iam.create_instance_profile(InstanceProfileName=name)
    profile = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
    if not profile["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


@contextlib.contextmanager
def there_already():
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] != "EntityAlreadyExists":
            raise


def make_group(region: str, ssh_from: str) -> str:
    """A security group in the default VPC: ssh from one range, and all between its members."""
    ec2 = boto3.client("ec2", region_name=region)
    (vpc,) = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    found = ec2.describe_security_groups(
        Filters=[
            {"Name": "group-name", "Values": [GROUP]},
            {"Name": "vpc-id", "Values": [vpc["VpcId"]]},
        ]
    )["SecurityGroups"]
    if found:
        group, rules = found[0]["GroupId"], found[0]["IpPermissions"]
        if rules:  # of an address you may have no more
            ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rules)
    else:
        group = ec2.create_security_group(
            GroupName=GROUP, Description="lepton_ray cluster", VpcId=vpc["VpcId"]
        )["GroupId"]
    kind = "Ipv6Ranges" if ":" in ssh_from else "IpRanges"
    address = "CidrIpv6" if ":" in ssh_from else "CidrIp"
    ec2.authorize_security_group_ingress(
        GroupId=group,
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, kind: [{address: ssh_from}]},
            {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
        ],
    )
    return group


def named(text: str, region: str, bucket: str, group: str) -> str:
    """The cluster file with these names at its top."""
    zones = ",".join(f"{region}{letter}" for letter in "abc")
    for pattern, value in (
        (r"(region: &region ).*", region),
        (r"(zones: &zones ).*", zones),
        (r"(LEPTON_STORAGE=)\S+", f"s3://{bucket}/lepton"),
        (r"(security_groups: &security_groups ).*", f"[{group}]"),
    ):
        text, n = re.subn(pattern, rf"\g<1>{value}", text)
        assert n == 1, pattern
    return text


if __name__ == "__main__":
    main()
