#!/usr/bin/env bash
# Train on Cloud TPUs of a GKE cluster, with XPK (pip install xpk).
#
#   CLUSTER=mine ZONE=us-west4-a IMAGE=gcr.io/me/rebased BUCKET=gs://mine \
#     recipes/xpk.sh first pile-157m-rebased --data.path /data/tokens
#
# The first argument names the workload and the run, the others are those of
# `rebased train`. Data must be on the nodes, such as in a mounted bucket. The
# image is that of Dockerfile with EXTRAS=tpu,text,gcs.
set -euo pipefail

if [ "$#" -lt 2 ]; then
  echo "usage: recipes/xpk.sh NAME PRESET [--options of rebased train]" >&2
  exit 2
fi
name=$1
shift
command="rebased train $(printf '%q ' "$@")--run-dir $BUCKET/runs/$name"
command+=" --distributed auto"

xpk workload create \
  --cluster "$CLUSTER" \
  --zone "$ZONE" \
  --workload "$name" \
  --tpu-type "${TPU_TYPE:-v5litepod-16}" \
  --num-slices 1 \
  --docker-image "$IMAGE" \
  --max-restarts "${MOST_RESTARTS:-50}" \
  --termination-grace-period-seconds 300 \
  --command "$command"
