#!/usr/bin/env bash
# Makes what cluster/gcp.yaml names: cluster/iam/gcp.sh PROJECT BUCKET YOUR-ADDRESS/32 [REGION]
# Then replace CHANGE-ME in the file. Run it again after a change: what is there stays.
set -euo pipefail
project=${1:?PROJECT} bucket=${2:?BUCKET} from=${3:?YOUR-ADDRESS/32} region=${4:-us-central1}
here=$(cd "$(dirname "$0")" && pwd)
[ "$from" != 0.0.0.0/0 ] || { echo "name your own address, not the whole world" >&2; exit 2; }

quiet() { "$@" 2> >(grep -v 'already exists' >&2) || true; }

gcloud config set project "$project"
gcloud services enable compute.googleapis.com iam.googleapis.com cloudresourcemanager.googleapis.com
quiet gcloud storage buckets create "gs://$bucket" --location "$region" \
    --uniform-bucket-level-access --public-access-prevention

# A network that only your address reaches, on the port of ssh; its own machines reach each other.
quiet gcloud compute networks create lepton-ray --subnet-mode custom
quiet gcloud compute networks subnets create lepton-ray --network lepton-ray --region "$region" \
    --range 10.20.0.0/20 --enable-private-ip-google-access
quiet gcloud compute firewall-rules create lepton-ray-ssh --network lepton-ray --allow tcp:22 \
    --source-ranges "$from"
gcloud compute firewall-rules update lepton-ray-ssh --source-ranges "$from"
quiet gcloud compute firewall-rules create lepton-ray-inside --network lepton-ray --allow all \
    --source-ranges 10.20.0.0/20

# The head may start and end machines and hand workers their account; both may use the bucket.
quiet gcloud iam roles create leptonRayHead --project "$project" --file "$here/gcp-head.yaml"
for machine in head worker; do
    account=lepton-ray-$machine@$project.iam.gserviceaccount.com
    quiet gcloud iam service-accounts create "lepton-ray-$machine"
    gcloud storage buckets add-iam-policy-binding "gs://$bucket" \
        --member "serviceAccount:$account" --role roles/storage.objectUser
done
head=serviceAccount:lepton-ray-head@$project.iam.gserviceaccount.com
gcloud projects add-iam-policy-binding "$project" --member "$head" \
    --role "projects/$project/roles/leptonRayHead" --condition None
gcloud iam service-accounts add-iam-policy-binding \
    "lepton-ray-worker@$project.iam.gserviceaccount.com" \
    --member "$head" --role roles/iam.serviceAccountUser
