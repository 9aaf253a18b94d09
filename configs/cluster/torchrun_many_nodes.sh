#!/usr/bin/env bash
# Several machines with torchrun, one process a GPU: run this on each of them with the same variables and arguments, within 15
# minutes. --out is on a file system that they share.
#   NODES=4 HEAD=10.0.0.1 configs/cluster/torchrun_many_nodes.sh denoiser fit --config configs/denoiser/dit_xl_8gpu.yaml \
#     --data.batch_size 8 --out /shared/runs/denoiser
# data.batch_size is per process: 8 on 32 GPUs are the 256 of the recipe. The same command resumes from the newest whole
# checkpoint. When a machine is lost, the others exit with a message, after Lightning's timeout at the latest.
set -euo pipefail

NODES=${NODES:?how many machines}
HEAD=${HEAD:?name or address of one of them, which the others can reach}
PORT=${PORT:-29400}
RUN=${RUN:-ldm} # distinguishes runs with the same endpoint
PYTHON=${PYTHON:-python}
PROCESSES=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)} # of each machine
export OMP_NUM_THREADS=${THREADS:-1}                      # of each process

exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES" --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN" --rdzv-conf join_timeout=900 \
  -m ldm "$@" --trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES" --resume latest
