#!/usr/bin/env bash
# Train every part of the Toybox model, and its judge, on one GPU, in SECONDS_IN_ALL (default 550).
#
#     bash training/toybox_gpu.sh runs/gpu            (then copy runs/gpu/ship/* over data/checkpoints/)
#
# First every stage makes a few steps while all cores draw pictures: so a mistake shows early, and the UNet is compiled.
# Then the text encoder and the autoencoder's decoder are trained at the same time, and in the rest of the time the UNet
# and the judge. Each process has two CPU threads. Ctrl-C: every stage saves its state, and the same command goes on.
set -euo pipefail
export COURSE_CACHE="${COURSE_CACHE:-/tmp/course}" TOKENIZERS_PARALLELISM=false PYTHONPATH=".:${PYTHONPATH:-}"
out="${1:-runs/gpu}" all="${SECONDS_IN_ALL:-550}" python="${PYTHON:-python3}"
pictures="${PICTURES:-300000}" judged="${JUDGED:-100000}" individuals="${INDIVIDUALS:-12000}"
small="${SMALL:-0.75}" judge_minutes="${JUDGE_MINUTES:-1.6}" # minutes of each of the two small parts, and of the judge
compile="${COMPILE---compile}" batch="${BATCH:-512}" few="${FEW:-60}"
parts="$out/ship/toybox-sd" smoke="$out/smoke"
mkdir -p "$out"
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT # every stage saves before it ends
trap 'exit 130' INT TERM

say() { echo "[$SECONDS s] $*"; }
draw() { # how many, of which split
  "$python" -c "from course_lib.toybox.sets import pair_images; pair_images($1, split='$2')" 2>/dev/null
  say "$1 pictures are drawn ($2)"
}
train() { # name, then the options of training/toybox_<name>.py
  local name=$1
  shift
  "$python" "training/toybox_$name.py" --out "$out/$name" --precision bf16 --by-clock --threads 2 --steps 1000000 "$@" \
    >>"$out/$name.log" 2>&1 &
  local pid=$!
  trap 'kill $pid 2>/dev/null; wait $pid; exit 130' TERM
  wait $pid || { tail -n 15 "$out/$name.log"; say "$name failed"; return 1; }
}

draw "$pictures" train & drawing=$!
first="--steps $few --images 600"
train vae --batch-size 64 $first --out "$smoke/vae" --ship "$smoke/parts/vae" & vae=$!
train clip --batch-size 64 $first --out "$smoke/clip" --ship "$smoke/parts" --workers 2 & clip=$!
train judge --batch-size 64 $first --out "$smoke/judge" --ship "$smoke/judge-model" --individuals 300 & judge=$!
wait $vae; wait $clip; wait $judge
say "the small parts can be trained"
train unet --batch-size "$batch" $first $compile --workers 4 --out "$smoke/unet" --parts "$smoke/parts" \
  --ship "$smoke/parts" & unet=$!

wait $drawing
draw "$judged" judge & drawing=$!
train vae --images "$pictures" --minutes "$small" --batch-size 128 --ship "$parts/vae" & vae=$!
train clip --images "$pictures" --minutes "$small" --batch-size 1024 --workers 5 --ship "$parts" & clip=$!
wait $unet
say "the UNet can be trained: $(grep loss "$out/unet.log" | tail -n 1)"
mv "$out/unet.log" "$out/unet-first.log"
wait $vae; wait $clip; wait $drawing
say "$(grep psnr "$out/vae.log" | tail -n 1) $(grep caption_of "$out/clip.log" | tail -n 1)"

train judge --images "$judged" --individuals "$individuals" --minutes "$judge_minutes" --batch-size 384 \
  --ship "$out/ship/toybox-judge" & judge=$!
minutes=$("$python" -c "print(($all - $SECONDS - ${OVERHEAD:-55}) / 60)")
train unet --images "$pictures" --minutes "$minutes" --batch-size "$batch" --lr 1e-3 --cooldown 0.5 --ema 0.999 \
  $compile --workers 6 --save-every 1.4 --parts "$parts" --ship "$parts"
say "$(grep loss "$out/unet.log" | tail -n 1)"
wait $judge
say "$(grep partner "$out/judge.log" | tail -n 1)"
