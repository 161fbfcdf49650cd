#!/usr/bin/env bash
# Segment many volumes with an array of jobs: task i takes every N-th file. Submit from the project directory:
#   INPUT=/scratch/embryo7 MODEL=models/nuclei_3d sbatch --array=0-7 docs/slurm/predict.sh
# When all are done, write their page: nuclei3d predict /scratch/embryo7 --model models/nuclei_3d --out predictions
#SBATCH --job-name=nuclei3d-predict
#SBATCH --array=0-3
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%A_%a.txt

set -euo pipefail
source "${VENV:-.venv}/bin/activate"
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:?give the address of the MLflow server}"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

first="${SLURM_ARRAY_TASK_MIN:-0}"
task=$((${SLURM_ARRAY_TASK_ID:-0} - first))
tasks="${SLURM_ARRAY_TASK_COUNT:-1}"
mapfile -t all < <(find "${INPUT:?give a folder of TIFF files}" -maxdepth 1 -type f -name '*.tif*' | sort)
mine=()
for ((i = task; i < ${#all[@]}; i += tasks)); do mine+=("${all[i]}"); done
if [ "${#mine[@]}" -eq 0 ]; then
    echo "nothing to do for task $task of $tasks"
    exit 0
fi

srun nuclei3d predict "${mine[@]}" --model "${MODEL:-runs/nuclei_3d}" --out "${OUT:-predictions}" \
    --set predict.report=false
