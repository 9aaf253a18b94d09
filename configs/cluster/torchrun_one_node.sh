#!/usr/bin/env bash
# One machine with torchrun, one process a GPU. All arguments are those of ldm:
#   configs/cluster/torchrun_one_node.sh denoiser fit --config configs/denoiser/dit_xl_8gpu.yaml --out runs/denoiser
# The same command resumes from the newest whole checkpoint. SIGTERM or SIGUSR1, to this or to any process, saves and stops the
# run; torchrun then exits with 1, although its processes exit with 143. On CPUs: PROCESSES=2, and THREADS=8 for larger networks.
set -euo pipefail

PYTHON=${PYTHON:-python}
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS=${THREADS:-1} # of each process

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" \
  -m ldm "$@" --trainer.devices "$PROCESSES" --resume latest
