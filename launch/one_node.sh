#!/bin/sh
# All GPUs of this machine on one run; without GPUs, PROCESSES processes on its CPU.
#   launch/one_node.sh run digits --data faces.zip --out runs/faces
#   PROCESSES=4 launch/one_node.sh run digits
# The same command goes on from the last checkpoint, on any number of processes that divides the batch.
set -eu
exec torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" -m -- onejump "$@"
