#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` runs one process and does not say so.
#
# A script that trains on two processes then trains on one, with half of the batch. `torchrun` starts two. Seen:
#
#   accelerate launch --cpu --num_processes 2: process 0 of 1
#   torchrun --nproc_per_node 2: process 0 of 2, process 1 of 2
#
# Exits with 1 once accelerate starts two.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$work/count.py" <<'PY'
from accelerate import PartialState

state = PartialState(cpu=True)
print(f"process {state.process_index} of {state.num_processes}")
PY
export OMP_NUM_THREADS=1
accelerate=$("$work/venv/bin/accelerate" launch --cpu --num_processes 2 "$work/count.py" 2>/dev/null | sort)
torchrun=$("$work/venv/bin/torchrun" --nproc_per_node 2 "$work/count.py" 2>/dev/null | sort)
echo "accelerate launch --cpu --num_processes 2: $accelerate"
echo "torchrun --nproc_per_node 2: ${torchrun//$'\n'/, }"
test "$accelerate" = "process 0 of 1"
test "$torchrun" = $'process 0 of 2\nprocess 1 of 2'
