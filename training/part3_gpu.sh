#!/usr/bin/env bash
# Train unCLIP and the GAN of cats on one GPU, side by side, in SECONDS_IN_ALL (default 540).
#
#     bash training/part3_gpu.sh runs/gpu3            (then copy runs/gpu3/ship/* over data/checkpoints/)
#
# While the CPU cores draw pictures, every part makes a few steps, so that a mistake shows early. Then the decoder, the prior,
# the regression (these two for PRIOR_MINUTES) and the GAN are trained at the same time, and the GAN's encoder in the last
# ENCODER seconds. The decoder starts from the Toybox model in PARTS, or goes on from a shipped decoder, DECODER_START.
# Ctrl-C: every part saves its state, and the same command goes on.
set -euo pipefail
export COURSE_CACHE="${COURSE_CACHE:-/tmp/course}" TOKENIZERS_PARALLELISM=false PYTHONPATH=".:${PYTHONPATH:-}"
out="${1:-runs/gpu3}" all="${SECONDS_IN_ALL:-540}" python="${PYTHON:-python3}" pictures="${PICTURES:-60000}"
batch="${BATCH:-256}" few="${FEW:-20}" encoder="${ENCODER:-60}" overhead="${OVERHEAD:-30}" precision="${PRECISION:-bf16}"
parts="${PARTS:-data/checkpoints/toybox-sd}" cats="${CATS:-20000}"
from="${DECODER_START:+--start-from $DECODER_START}"
mkdir -p "$out"
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT # every part saves before it ends
trap 'exit 130' INT TERM

say() { echo "[$SECONDS s] $*"; }
train() { # name of the run, script, part, then its options
  local name=$1 script=$2 part=$3
  shift 3
  "$python" "training/toybox_$script.py" "$part" --out "$out/$name" --precision "$precision" --threads 2 "$@" \
    >>"$out/$name.log" 2>&1 &
  local pid=$!
  trap 'kill $pid 2>/dev/null; wait $pid; exit 130' TERM
  wait $pid || { tail -n 15 "$out/$name.log"; say "$name failed"; return 1; }
}

"$python" -c "from course_lib.toybox.sets import pair_images; pair_images($pictures, split='rich')" 2>/dev/null & drawing=$!
first="--steps $few --batch-size 8"
for part in decoder prior regression; do
  train "first-$part" unclip "$part" $first --images 200 --parts "$parts" $([ $part = decoder ] && echo "$from")
done
train first-gan gan gan $first --images 200
say "every part can be trained"
wait $drawing
say "$pictures pictures are drawn"
minutes=$("$python" -c "print(max(0.05, ($all - $SECONDS - $overhead - $encoder) / 60))")
short=$("$python" -c "print(min(${PRIOR_MINUTES:-3}, $minutes))")
clock="--steps 1000000 --by-clock --cooldown 0.5 --save-every 1.5"
rich="--split rich --images $pictures --parts $parts --ship $out/ship/toybox-unclip"
train prior unclip prior $clock --minutes "$short" $rich --batch-size "$((2 * batch))" --lr 1e-3 --workers 3 & prior=$!
train regression unclip regression $clock --minutes "$short" $rich --batch-size "$((2 * batch))" --lr 1e-3 --workers 2 & regression=$!
train gan gan gan $clock --minutes "$minutes" --batch-size "$((batch / 4))" --images "$cats" --ema 0.999 --ship "$out/ship/toybox-gan" & gan=$!
train decoder unclip decoder $clock --minutes "$minutes" $rich --batch-size "$batch" --lr 3e-4 --ema 0.999 --workers 4 \
  $from
say "decoder: $(grep loss "$out/decoder.log" | tail -n 1)"
wait $gan
train encoder gan encoder --steps 1000000 --by-clock --cooldown 0.5 --batch-size "$batch" --lr 1e-3 --save-every 1.5 \
  --minutes "$("$python" -c "print(max(0.05, $encoder / 60))")" --generator "$out/ship/toybox-gan/generator" \
  --ship "$out/ship/toybox-gan" & last=$!
wait $prior; wait $regression
say "prior: $(grep test_loss "$out/prior.log" | tail -n 1)"
say "regression: $(grep test_loss "$out/regression.log" | tail -n 1)"
wait $last
say "encoder: $(grep test_loss "$out/encoder.log" | tail -n 1)"
