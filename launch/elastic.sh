#!/bin/sh
# As one_node.sh, but when a process dies or hangs all are started again, up to RESTARTS times, and go on from the last
# checkpoint. What a crash costs is the steps since then: save_every of them at most.
#   RESTARTS=10 launch/elastic.sh run digits --data faces.zip --out runs/faces save_every=500
set -eu
exec torchrun --standalone --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-3}" -m -- onejump "$@"
