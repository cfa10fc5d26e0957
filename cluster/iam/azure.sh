#!/usr/bin/env bash
# Makes what cluster/azure.yaml names: cluster/iam/azure.sh STORAGE-ACCOUNT [GROUP] [LOCATION]
# Then replace CHANGEME in the file by the account's name.
set -euo pipefail
account=${1:?STORAGE-ACCOUNT} group=${2:-lepton-ray} location=${3:-westus2}
here=$(cd "$(dirname "$0")" && pwd)
subscription=$(az account show --query id --output tsv)

az group create --name "$group" --location "$location" --output none
az storage account create --name "$account" --resource-group "$group" --location "$location" \
    --sku Standard_LRS --hns true --min-tls-version TLS1_2 --allow-blob-public-access false --output none
az storage fs create --name lepton --account-name "$account" --auth-mode login --output none

az identity create --name lepton-ray --resource-group "$group" --location "$location" --output none
principal=$(az identity show --name lepton-ray --resource-group "$group" --query principalId -o tsv)
sed "s/SUBSCRIPTION/$subscription/; s/GROUP/$group/" "$here/azure-head.json" > /tmp/lepton-role.json
az role definition create --role-definition /tmp/lepton-role.json --output none ||
    az role definition update --role-definition /tmp/lepton-role.json --output none
rm /tmp/lepton-role.json
scope=/subscriptions/$subscription/resourceGroups/$group
az role assignment create --assignee-object-id "$principal" --assignee-principal-type ServicePrincipal \
    --role "lepton_ray machines" --scope "$scope" --output none
az role assignment create --assignee-object-id "$principal" --assignee-principal-type ServicePrincipal \
    --role "Storage Blob Data Contributor" \
    --scope "$scope/providers/Microsoft.Storage/storageAccounts/$account" --output none
