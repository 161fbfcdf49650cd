#!/usr/bin/env bash
# Search for training parameters with an array of workers, one GPU each. Submit from the project directory:
#   STORAGE=postgresql://me@dbhost/optuna TRIALS=60 sbatch --array=1-8 docs/slurm/search.sh
# Every task runs the same command; together they do $TRIALS trials, whichever tasks are killed, preempted or
# started later. The first task to come makes the study; the others join it.
#SBATCH --job-name=nuclei3d-search
#SBATCH --array=1-4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%A_%a.txt

set -euo pipefail
source "${VENV:-.venv}/bin/activate"
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:?give the address of the MLflow server}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# the password, if there is one, belongs into ~/.pgpass, not into the command line
storage="${STORAGE:?give postgresql://user@host/database}"

srun nuclei3d search --slices "${SLICES:-slices}" --out "${OUT:-runs/search}" \
    --trials "${TRIALS:-40}" --storage "$storage"
