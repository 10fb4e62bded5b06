#!/usr/bin/env bash
# The GPU page in one command: build, smoke test, ceilings, our rows, GPU tests, peers' rows. It
# needs no network, ends by itself within MINUTES, and may be stopped at any moment: each step
# leaves what it has, each case is saved when it is measured.
#
#   benchmarks/gpu/run.sh             on a machine with an NVIDIA GPU and a python that has torch
#   SHORT=1 benchmarks/gpu/run.sh     a rerun after a mend: no tests and no peers
#   DRY_RUN=1 benchmarks/gpu/run.sh   the time plan, then everything but the launches, anywhere
#   DRY_RUN=plan benchmarks/gpu/run.sh   the time plan alone
#   STEPS="build sanitize" benchmarks/gpu/run.sh   the CUDA kernels under compute-sanitizer
#
# PYTHON   the interpreter to use (python3)
# OUT      where the JSON and the logs go (benchmarks/results)
# PEERS    a folder of peers to measure: pure-Python wheels, or such unpacked (peers)
# CACHE    compiled Triton kernels, as `python -m benchmarks.gpu.kernel_cache pack` leaves them;
#          used where they are of the Triton that is here (kernel-cache.tar.xz)
# MINUTES  what all of it may take (7.5, or 3.5 for SHORT=1); the plan stretches with it
# STEPS    which parts to run, of those in PLAN below
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3} OUT=${OUT:-benchmarks/results} PEERS=${PEERS:-peers}
CACHE=${CACHE:-kernel-cache.tar.xz} DRY_RUN=${DRY_RUN:-0} SHORT=${SHORT:-0}
if ((SHORT)); then
  MINUTES=${MINUTES:-3.5} STEPS=${STEPS:-build smoke ceilings ours}
else
  MINUTES=${MINUTES:-7.5} STEPS=${STEPS:-build smoke ceilings ours counters tests peers}
fi
# Seconds planned for each step. One ends by the time that it and those before it are planned for:
# what they did not need is its own, and none takes the time of a later one.
declare -A PLAN=([build]=45 [smoke]=30 [ceilings]=15 [ours]=110 [counters]=20 [tests]=120
  [peers]=100 [sanitize]=240)
export PYTHONUNBUFFERED=1
status=0 due=0 plan_alone=0
[[ $DRY_RUN != plan ]] || { DRY_RUN=1 plan_alone=1; }

# limited LOG COMMAND...: interrupted when its step must end, as if by Ctrl-C, so that it can still
# say what it has done; killed if it does not end. Returns 124 where time was up.
limited() {
  local limit=$((DRY_RUN ? 3600 : due - SECONDS)) log=$OUT/gpu-$1.log
  shift
  if ((limit < 5)); then
    echo "no time left" | tee "$log"
    return 124
  fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$log" 2>&1
}

# report WHAT STATUS LOG LINES: one line, and the end of the log.
report() {
  case $2 in
    0) echo "$1: done after ${SECONDS} s" ;;
    124 | 137) echo "$1: stopped after ${SECONDS} s, its time was up" ;;
    *) echo "$1: FAILED with status $2" && status=1 ;;
  esac
  tail -n "$4" "$OUT/gpu-$3.log"
}

peers_path() {
  local path=$PWD wheel
  if [[ -d $PEERS ]]; then
    path=$path:$(cd "$PEERS" && pwd)
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    for wheel in "$PEERS"/*.whl; do
      [[ -e $wheel ]] && "$PYTHON" -m zipfile -e "$wheel" "$unpacked" && path=$path:$unpacked
    done
  fi
  export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
}

# With the CUDA kernels where there is an nvcc for this torch; without them, if they do not build.
build() {
  local code=0
  limited build "$PYTHON" setup.py build_ext --inplace || code=$?
  report build "$code" build $((code == 0 ? 0 : 20))
  if ((code != 0)); then
    code=0
    PPO_FAST_BUILD=cpu limited build-cpu "$PYTHON" setup.py build_ext --inplace || code=$?
    report "build without CUDA" "$code" build-cpu $((code == 0 ? 0 : 20))
  fi
  "$PYTHON" -c 'import ppo_fast; print("backend cuda:", ppo_fast.backends()["cuda"] or "usable")'
  [[ ! -e $CACHE ]] || "$PYTHON" -m benchmarks.gpu.kernel_cache unpack "$CACHE" || true
}

# Every op once on each backend, within its budget: what fails here explains the rest.
smoke() {
  local code=0 backends=(triton cuda)
  ((DRY_RUN)) && backends=()
  limited smoke "$PYTHON" tests/scripts/smoke.py "${backends[@]}" || code=$?
  report smoke "$code" smoke $((code == 0 ? 2 : 20))
}

ceilings() {
  local code=0 device=cuda
  ((DRY_RUN)) && device=cpu
  limited ceilings "$PYTHON" -m benchmarks.gpu.ceilings "$device" "$OUT/gpu-ceilings.json" || code=$?
  report ceilings "$code" ceilings 30
}

# rows LOG SECONDS PEERS...: cases with a goal first, the cheap before the expensive.
rows() {
  local code=0 log=$1 seconds=$2
  shift 2
  # Status 1 is that of rows that say why they have no time: the table shows them.
  limited "$log" "$PYTHON" -m benchmarks --device cuda "$@" --save-results --results-dir "$OUT" \
    --case-seconds "$seconds" -q -rN || code=$?
  report "$log" $((code == 1 ? 0 : code)) "$log" $((code > 1 ? 30 : 0))
}

# Ours and the ceilings alone: no peer's compilation stands before a goal's figure.
ours() {
  if ((DRY_RUN)); then
    local code=0
    # Interpreted, the Triton backend can be named without a GPU; nothing is launched.
    TRITON_INTERPRET=1 limited ours "$PYTHON" -m benchmarks.gpu.dry_run || code=$?
    report "rows, on shapes" "$code" ours 1000
    return
  fi
  rows ours 20 --peers none -k "not reference"
}

peers() {
  ((DRY_RUN)) && echo "peers: bound above" && return
  rows peers 40 --peers all
}

# Traffic and instructions of one call by the hardware's counters, where they can be read.
counters() {
  local code=0 ncu
  ncu=$(command -v ncu || echo "${CUDA_HOME:-/usr/local/cuda}/bin/ncu")
  if ((DRY_RUN)) || [[ ! -x $ncu ]]; then
    echo "counters: not read, $( ((DRY_RUN)) && echo "nothing is launched" || echo "no $ncu")"
    return
  fi
  # The clocks stay as they are. L2 sectors are 32 bytes.
  limited counters "$ncu" --clock-control none --kernel-name regex:logits_ppo --launch-count 4 \
    --metrics dram__bytes_read.sum,dram__bytes_write.sum,smsp__inst_executed.sum,gpu__time_duration.sum \
    "$PYTHON" -m benchmarks.gpu.one_call logits_ppo_loss || code=$?
  report counters "$code" counters 40
}

# The folders of the tests that run kernels; what only a GPU can show first.
tests() {
  local code=0 options=(-m "gpu and not long" -p no:cacheprovider --continue-on-collection-errors)
  if ((DRY_RUN)); then
    options+=(-q --collect-only)
  else
    options+=(-v --tb=short -rf)
    # In the order of their names, as far as time goes.
    "$PYTHON" -c "import xdist" 2>/dev/null && options+=(-n 8 --dist load --maxschedchunk 8)
  fi
  limited tests "$PYTHON" -m pytest tests/backends/test_gpu.py tests/ops tests/contract \
    tests/backends "${options[@]}" || code=$?
  report tests "$code" tests $((code == 0 ? 1 : 30))
}

# What each tool finds in one run of every op; a machine without them says so.
sanitize() {
  local code tool sanitizer
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if ((DRY_RUN)) || [[ ! -x $sanitizer ]]; then
    echo "sanitizers: not run, $( ((DRY_RUN)) && echo "nothing is launched" || echo "no $sanitizer")"
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    code=0
    limited "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.gpu.sanitize || code=$?
    report "$tool" "$code" "$tool" $((code == 0 ? 1 : 30))
  done
}

planned=0
for step in $STEPS; do
  [[ -n ${PLAN[$step]:-} ]] || { echo "STEPS: ${!PLAN[*]}, got '$step'" && exit 2; }
  planned=$((planned + PLAN[$step]))
done
whole=$(awk "BEGIN { print int($MINUTES * 60) }")
# Seconds from the start when that much of the plan must be over; ten are for the summary.
due_after() { echo $(($1 * (whole - 10) / planned)); }

mkdir -p "$OUT"
peers_path
if ((DRY_RUN)); then
  echo "time plan for $whole s:"
  at=0
  for step in $STEPS; do
    printf '  %-9s from %3d s to %3d s\n' "$step" "$(due_after $at)" "$(due_after $((at + PLAN[$step])))"
    at=$((at + PLAN[$step]))
  done
  printf '  %-9s from %3d s to %3d s\n' summary "$(due_after $at)" "$whole"
  ((plan_alone)) && exit
fi
at=0
for step in $STEPS; do
  at=$((at + PLAN[$step]))
  due=$(due_after $at)
  "$step"
done
if ((!DRY_RUN)); then
  "$PYTHON" -m benchmarks.gpu.summary "$OUT" || status=1
fi
echo "run.sh took ${SECONDS} s"
exit "$status"
