#!/usr/bin/env bash
# The whole road on scikit-learn's handwritten digits: shard, pretrain, fine-tune, evaluate, export, predict, report.
# Run again, it goes on from what is there. Usage: launch/demo.sh FOLDER, with `vitscale` on the PATH.
set -euo pipefail
demo=${1:?usage: launch/demo.sh FOLDER}
mkdir -p "$demo"
: > "$demo/commands.txt"

run() { # print a command as a user would type it, keep it for the report, and run it
  printf '\n$ %s\n' "$*"
  printf '%s\n' "$*" >> "$demo/commands.txt"
  "$@"
}

if [ -f "$demo/images/complete" ]; then
  printf '\n%s is there already\n' "$demo/images"
else
  run python -m vitscale.data_prep.digits "$demo/images"
  touch "$demo/images/complete"
fi
for split in train test; do
  run vitscale shard "$demo/images/$split" "$demo/shards/$split" "split=$split"
done
processes=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
data=("data.train=$demo/shards/train" "data.val=$demo/shards/test")
run vitscale pretrain digits-demo "${data[@]}" "run.dir=$demo/pretrain" --nproc "$processes"
run vitscale finetune digits-demo-finetune "init_from=$demo/pretrain" "${data[@]}" "run.dir=$demo/finetune" --nproc "$processes"
run vitscale evaluate "$demo/pretrain" "$demo/shards/test" --nproc "$processes"
run vitscale evaluate "$demo/finetune" "$demo/shards/test" --nproc "$processes"
if [ -d "$demo/export" ]; then
  printf '\n%s is there already\n' "$demo/export"
else
  run vitscale export "$demo/finetune" "$demo/export"
fi
samples=("$demo"/images/test/{3,7,9}/*.png)
run vitscale predict "$demo/export" "${samples[0]}" "${samples[50]}" "${samples[100]}"
run vitscale report "$demo/pretrain" "$demo/finetune" --commands "$demo/commands.txt" --out "$demo/report.html"
