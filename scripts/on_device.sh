#!/usr/bin/env bash
# What a GPU at hand can tell in eight minutes, without a network: the tests that need one, the times of steps beside the
# plan's model, and a profile. Every part is given its time, writes into $OUT as it goes, and does not keep the next from
# running.
#
#   OUT=results scripts/on_device.sh             on one H100 or H200
#   OUT=results scripts/on_device.sh --train     trains the parts of scenes there, and times AR and CASCADE with them
#   OUT=results scripts/on_device.sh --tiny      the first part with tiny shapes, anywhere, to try it out
#   OUT=results scripts/on_device.sh --train --tiny   the second likewise: two steps of everything
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-on-device}")
python=${PYTHON:-python3}
train=no tiny=() patience=1
for flag in "$@"; do
  case $flag in
    --train) train=yes ;;
    --tiny) tiny=(--tiny) patience=20 ;;  # times are a GPU's
    *) echo "on_device.sh: unknown flag $flag: --train and --tiny are what there is" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

part() {  # name, seconds, command...
  local name=$1 seconds=$((patience * $2)) begin=$SECONDS
  shift 2
  echo "== $name" | tee -a "$out/log.txt"
  timeout --kill-after=5 "$seconds" "$@" >>"$out/log.txt" 2>&1 || failed+=("$name (exit $?)")
  echo "   $((SECONDS - begin)) s" | tee -a "$out/log.txt"
}

if [ "$train" = no ]; then
  "$python" -c 'import jax; print(jax.__version__, jax.devices())' | tee "$out/log.txt"
  part "tests marked gpu" 120 "$python" -m pytest -q -o addopts= -p no:cacheprovider -m gpu tests/test_gpu.py
  part "step times" 330 "$python" scripts/on_device.py --out "$out" --seconds 270 "${tiny[@]}"
  cat "$out/steps.md" 2>/dev/null
else
  # what a run weighs does not matter here: checkpoints stay in a folder of their own, and the model alone comes back
  runs=$(mktemp -d) steps=() sequences=1024 count=16 edition=scenes
  trap 'rm -rf "$runs"' EXIT
  [ ${#tiny[@]} -gt 0 ] && steps=(--steps 2 --batch 2) sequences=8 count=1 edition=scenes-small
  echo "== training in $runs" | tee "$out/log.txt"
  scenes=("$python" -m cascade_jax scenes)
  part "tokenizer" 150 "${scenes[@]}" train tokenizer --out "$runs" "${steps[@]}"
  part "judge" 60 "${scenes[@]}" train judge --out "$runs" "${steps[@]}"
  part "target" 240 "${scenes[@]}" train target --edition "$edition" --out "$runs" "${steps[@]}"
  part "drafter" 120 "${scenes[@]}" train drafter --out "$runs" "${steps[@]}" --sequences "$sequences"
  part "pack" 60 "${scenes[@]}" pack "$runs" --out "$runs/model/scenes"
  part "compare" 120 "$python" -m cascade_jax compare --model "$runs/model/scenes" --methods ar,eagle,cascade \
    --count "$count" --out "$runs/compared"
  [ -d "$runs/model" ] && tar -C "$runs/model" -czf "$out/model.tar.gz" .
  cp "$runs"/compared/report.* "$out" 2>/dev/null && cat "$out/report.md"
fi
if [ ${#failed[@]} -gt 0 ]; then
  printf 'did not end well: %s\n' "${failed[@]}" | tee -a "$out/log.txt" >&2
  exit 1
fi
