#!/bin/sh
# On each of several machines, with the same words. They need one file system for --out and the data, and a port of HEAD.
#   NODES=4 HEAD=gpu01 launch/many_nodes.sh run digits --data faces.zip --out /shared/runs/faces
# NODES=2:4 goes on with fewer machines after one is lost, and with more when one joins; each number of processes that
# can come about must divide the batch.
set -eu
: "${NODES:?the number of machines, such as 4 or 2:4}" "${HEAD:?the name of one of them}"
exec torchrun --nnodes "$NODES" --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${ID:-onejump}" --rdzv-endpoint "$HEAD:${PORT:-29400}" -m -- onejump "$@"
