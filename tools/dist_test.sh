#!/usr/bin/env bash
# tools/dist_test.sh CONFIG CHECKPOINT NPROC [options of test.py]    ('': as test.py without one)
# Several machines: NNODES, NODE_RANK, MASTER_ADDR and PORT in the environment.
set -euo pipefail
(( $# >= 3 )) || { sed -n 2,3p "$0" >&2; exit 2; }
tools=$(dirname "$0")

PYTHONPATH="$tools/..:${PYTHONPATH:-}" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$tools/test.py" "$1" "$2" --launcher pytorch "${@:4}"
