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

once() { # the same for a command that made the folder $1, unless that is there
  local made=$1
  shift
  if [ -e "$made" ]; then
    printf '\n%s is there already, from: %s\n' "$made" "$*"
    printf '%s\n' "$*" >> "$demo/commands.txt"
  else
    run "$@"
  fi
}

once "$demo/images" python -m vitscale.data_prep.digits "$demo/images"
for split in train test; do
  run vitscale shard "$demo/images/$split" "$demo/shards/$split" "split=$split"
done
processes=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
data=("data.train=$demo/shards/train" "data.val=$demo/shards/test")
run vitscale pretrain digits-demo "${data[@]}" "run.dir=$demo/pretrain" --nproc "$processes"
run vitscale finetune digits-demo-finetune "init_from=$demo/pretrain" "${data[@]}" "run.dir=$demo/finetune" --nproc "$processes"
run vitscale evaluate "$demo/pretrain" "$demo/shards/test" --nproc "$processes"
run vitscale evaluate "$demo/finetune" "$demo/shards/test" --nproc "$processes"
once "$demo/export" vitscale export "$demo/finetune" "$demo/export"
samples=("$demo"/images/test/{3,7,9}/*.png)
run vitscale predict "$demo/export" "${samples[0]}" "${samples[50]}" "${samples[100]}"
run vitscale report "$demo/pretrain" "$demo/finetune" --commands "$demo/commands.txt" --out "$demo/report.html"
