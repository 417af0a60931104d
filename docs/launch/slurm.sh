#!/bin/bash
# Trains on several hosts under Slurm and goes on after preemption or the loss of a host:
#   sbatch docs/launch/slurm.sh --config configs/gspn_xl_2.py --data.path LATENTS --run-dir runs/xl
# One task a host drives all of its GPUs; the hosts find one another by Slurm's variables. Adapt the four lines below.
#SBATCH --job-name=gspn
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# SIGTERM two minutes before the limit, and on preemption: the run saves, exits with 75, and is queued again
#SBATCH --signal=TERM@120

PYTHON=${PYTHON:-.venv/bin/python}
# how long the slowest host may take to start
export GSPN_JOIN_SECONDS=${GSPN_JOIN_SECONDS:-900}
# no --kill-on-bad-exit: a host that fails is noticed by the others, which end by themselves with a code that says why
srun "$PYTHON" train_dit.py "$@"
code=$?
# 75: stopped after saving, or another host was lost
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 1000 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
