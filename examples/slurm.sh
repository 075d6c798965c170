#!/usr/bin/env bash
# Several machines under Slurm: one launcher a machine, one process a GPU, weights split over all of them (FSDP2).
#   OUTPUT=runs/mine sbatch examples/slurm.sh train_strided.py --cfg examples/raw_text.yaml \
#       lora=null train.learning_rate=1e-5
# Run it from the repository, on a file system that all machines share. A job that comes to its time limit saves and is
# queued again. A job that is pre-empted saves when its partition gives it the time (GraceTime). Either goes on from its
# last checkpoint.
#SBATCH --job-name=ebft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300          # five minutes before the end: the processes finish their step and save
set -euo pipefail
: "${OUTPUT:?is the output folder, for example OUTPUT=runs/mine}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280   # seconds that a launcher gives its processes to save (30 without it)
export MAIN_IP="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1}))

resume=()
if compgen -G "$OUTPUT/checkpoint-*/SHA256SUMS" > /dev/null; then resume=(train.resume=latest); fi

status=0
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch -q --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" "$@"' \
    bash "$@" "train.output_dir=$OUTPUT" "${resume[@]}" || status=$?

if [ "$status" -ne 0 ] && [ "$(date +%s)" -gt "$((SLURM_JOB_END_TIME - 330))" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
