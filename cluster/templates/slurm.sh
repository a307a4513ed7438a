#!/bin/bash
#SBATCH --job-name=%{name}
#SBATCH --nodes=%{nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=%{gpus_per_node}
#SBATCH --cpus-per-task=%{cpus_per_node}
#SBATCH --mem=%{memory_gb_per_node}G
#SBATCH --exclusive
#SBATCH --time=%{slurm_time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# From an environment in which cavmae is installed on every node: sbatch slurm.sh
set -euo pipefail

# A Ray port without a token runs anyone's code. Made once, in the home that all nodes share.
export RAY_AUTH_MODE=token
[ -s "$HOME/.ray/auth_token" ] || (umask 077; ray get-auth-token --generate > /dev/null)

# Lost nodes and ranks are noticed within seconds.
export RAY_health_check_initial_delay_ms=%{check_period_ms}
export RAY_health_check_period_ms=%{check_period_ms}
export RAY_health_check_timeout_ms=%{check_timeout_ms}
export RAY_health_check_failure_threshold=3
export RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S=15
export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=600

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# Two minutes before the time limit the run saves and stops, and the job is requeued; the run then
# resumes there, as it resumes from its newest checkpoint after a lost node.
again=
save_and_stop() {
    again=1
    cavmae stop %{run_dir} || scontrol requeue "$SLURM_JOB_ID"  # there is nothing to save yet
}
trap save_and_stop USR1
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
    ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_NNODES" \
    --num-cpus=%{cpus_per_node} --num-gpus=%{gpus_per_node} \
    -- %{command} &
step=$!
while true; do
    before=$again code=0
    wait $step || code=$?
    if [ "$again" = "$before" ]; then break; fi  # else the signal ended the wait, not the run
done
if [ -n "$again" -a $code -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
