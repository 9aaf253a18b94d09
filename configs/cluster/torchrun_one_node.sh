#!/usr/bin/env bash
# One machine, a process for each of its GPUs, by torchrun. All arguments are those of ldm:
#   configs/cluster/torchrun_one_node.sh denoiser fit --config configs/denoiser/dit_xl_8gpu.yaml --out runs/denoiser
# The same command again goes on from the run's newest whole checkpoint. SIGTERM and SIGUSR1, to this or to any process, save
# and stop; torchrun then leaves with 1, whatever its processes leave with (143). On CPUs: PROCESSES=2 and, for a network of
# some size, THREADS=8.
set -euo pipefail

PYTHON=${PYTHON:-python}
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
export OMP_NUM_THREADS=${THREADS:-1} # of each process

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" \
  -m ldm "$@" --trainer.devices "$PROCESSES" --resume latest
