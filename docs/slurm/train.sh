#!/usr/bin/env bash
# Train one model on one GPU. Submit from the project directory:
#   sbatch docs/slurm/train.sh
# A job that is preempted or runs out of time is started again by Slurm (--requeue) or by you, and goes on from
# its last epoch.
#SBATCH --job-name=nuclei3d-train
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.txt

set -euo pipefail
source "${VENV:-.venv}/bin/activate"
# a server, or a database on a file system that all nodes see; sqlite is for one writer at a time
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:?give the address of the MLflow server}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

srun nuclei3d train --slices "${SLICES:-slices}" --out "${OUT:-runs/nuclei_3d}"
