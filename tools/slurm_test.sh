#!/usr/bin/env bash
# tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]    ('': as test.py)
# In the environment: GPUS, GPUS_PER_NODE (8 each), CPUS_PER_TASK (5), SRUN_ARGS.
set -euo pipefail
(( $# >= 4 )) || { sed -n 2,3p "$0" >&2; exit 2; }
tools=$(dirname "$0")

# SRUN_ARGS is several words.
# shellcheck disable=SC2086
PYTHONPATH="$tools/..:${PYTHONPATH:-}" exec srun -p "$1" \
    --job-name="$2" \
    --gres="gpu:${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$tools/test.py" "$3" "$4" --launcher slurm "${@:5}"
