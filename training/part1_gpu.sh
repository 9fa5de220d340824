#!/usr/bin/env bash
# Train the models of Part 1 on one GPU, side by side, in SECONDS_IN_ALL (default 520).
#
#     COURSE_CIFAR10=cifar10.npz bash training/part1_gpu.sh runs/gpu1     (then copy runs/gpu1/ship/* over data/checkpoints/)
#
# While the CPU cores draw Toybox-10, the CIFAR-10 DDPM makes a few steps, so that a mistake shows early. Then the CIFAR-10
# classifier, the CIFAR-10 DDPM and the Toybox-10 DDPM are trained at the same time. The variable CIFAR_START names a shipped
# DDPM to go on from, EXACT pixel-exact test pictures. COMPILE=--compile compiles the networks, which took 3 of 8.5 minutes
# beside other trainings, too long for this size. Ctrl-C: every stage saves its state, and the same command goes on.
set -euo pipefail
export COURSE_CACHE="${COURSE_CACHE:-/tmp/course}" PYTHONPATH=".:${PYTHONPATH:-}"
out="${1:-runs/gpu1}" all="${SECONDS_IN_ALL:-520}" python="${PYTHON:-python3}" few="${FEW:-40}" overhead="${OVERHEAD:-40}"
compile="${COMPILE:-}" precision="${PRECISION:-bf16}" epochs="${EPOCHS:-40}"
cifar="--channels ${CIFAR_CHANNELS:-64 128 192} --batch-size ${CIFAR_BATCH:-256} --lr 8e-4 --ema 0.9995"
cifar="$cifar ${CIFAR_START:+--start-from $CIFAR_START}"
toybox="--toybox --score 300 --channels ${TOYBOX_CHANNELS:-64 128 192} --batch-size ${TOYBOX_BATCH:-256} --lr 8e-4 --ema 0.999"
: "${COURSE_CIFAR10:?name the CIFAR-10 file: COURSE_CIFAR10=cifar10.npz}"
mkdir -p "$out"
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT # every stage saves before it ends
trap 'exit 130' INT TERM

say() { echo "[$SECONDS s] $*"; }
train() { # name of the run, script, then its options
  local name=$1 script=$2
  shift 2
  "$python" "training/$script.py" --out "$out/$name" --precision "$precision" --threads 2 "$@" >>"$out/$name.log" 2>&1 &
  local pid=$!
  trap 'kill $pid 2>/dev/null; wait $pid; exit 130' TERM
  wait $pid || { tail -n 15 "$out/$name.log"; say "$name failed"; return 1; }
}

"$python" -c "from course_lib.data.cifar10 import toybox10; toybox10()" 2>/dev/null & drawing=$!
train first-ddpm ddpm_cifar10 $cifar $compile --steps "$few" --draw-steps 2 || { say "without --compile"; compile=; }
say "the DDPM can be trained: $(grep loss "$out/first-ddpm.log" | tail -n 1)"
wait $drawing
say "Toybox-10 is drawn"
minutes=$("$python" -c "print(max(0.05, ($all - $SECONDS - $overhead) / 60))")
clock="--steps 1000000 --by-clock --cooldown 0.5 --minutes $minutes --save-every 1.5 $compile"
train classifier classifier_cifar10 --epochs "$epochs" --minutes "$minutes" ${EXACT:+--exact "$EXACT"} --ship "$out/ship/classifier-cifar10" \
  & classifier=$!
train toybox ddpm_cifar10 $toybox $clock --ship "$out/ship/ddpm-toybox10" & small=$!
train cifar ddpm_cifar10 $cifar $clock --ship "$out/ship/ddpm-cifar10"
say "CIFAR-10: $(grep loss "$out/cifar.log" | tail -n 1)"
wait $small; wait $classifier
say "Toybox-10: $(grep loss "$out/toybox.log" | tail -n 1)"
say "classifier: $(tail -n 1 "$out/classifier.log")"
