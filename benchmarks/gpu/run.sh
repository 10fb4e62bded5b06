#!/usr/bin/env bash
# The GPU page in one command: build, GPU tests, GPU rows. It needs no network, ends by itself
# within MINUTES, and may be stopped at any moment: each case is saved when it is measured.
#
#   benchmarks/gpu/run.sh             on a machine with an NVIDIA GPU and a python that has torch
#   DRY_RUN=1 benchmarks/gpu/run.sh   everything but the launches, on any machine
#   STEPS="build sanitize" benchmarks/gpu/run.sh   the CUDA kernels under compute-sanitizer
#
# PYTHON   the interpreter to use (python3)
# OUT      where the JSON and the logs go (benchmarks/results)
# PEERS    a folder of peers to measure: pure-Python wheels, or such unpacked (peers)
# MINUTES  what all of it may take (9)
# STEPS    which parts to run ("build tests rows"; also: sanitize)
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3} OUT=${OUT:-benchmarks/results} PEERS=${PEERS:-peers}
DRY_RUN=${DRY_RUN:-0} MINUTES=${MINUTES:-9} STEPS=${STEPS:-build tests rows}
export PYTHONUNBUFFERED=1
status=0

# Seconds until the run must be over, less those given.
left() { echo $((MINUTES * 60 - SECONDS - ${1:-0})); }

# limited SECONDS LOG COMMAND...: interrupted after that long, as if by Ctrl-C, so that it can
# still say what it has done; killed if it does not end. Returns 124 where time was up.
limited() {
  local limit=$1 log=$OUT/gpu-$2.log
  shift 2
  if ((limit < 10)); then
    echo "no time left" | tee "$log"
    return 124
  fi
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$log" 2>&1
}

# report WHAT STATUS LOG LINES: one line, and the end of the log.
report() {
  case $2 in
    0) echo "$1: done after ${SECONDS} s" ;;
    124 | 137) echo "$1: stopped, its time was up" ;;
    *) echo "$1: FAILED with status $2" && status=1 ;;
  esac
  tail -n "$4" "$OUT/gpu-$3.log"
}

peers() {
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
  limited "$(left 60)" build "$PYTHON" setup.py build_ext --inplace || code=$?
  report build "$code" build $((code == 0 ? 0 : 20))
  if ((code != 0)); then
    code=0
    PPO_FAST_BUILD=cpu limited "$(left 60)" build-cpu "$PYTHON" setup.py build_ext --inplace ||
      code=$?
    report "build without CUDA" "$code" build-cpu $((code == 0 ? 0 : 20))
  fi
  "$PYTHON" -c 'import ppo_fast; print("backend cuda:", ppo_fast.backends()["cuda"] or "usable")'
}

tests() {
  local code=0 limit=$((MINUTES * 20)) options=(-m "gpu and not long" -q -p no:cacheprovider)
  if ((DRY_RUN)); then
    options+=(--collect-only)
  elif "$PYTHON" -c "import xdist" 2>/dev/null; then
    options+=(-n 8 --dist worksteal)
  fi
  limited "$limit" tests "$PYTHON" -m pytest tests "${options[@]}" || code=$?
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
    limited "$(left 10)" "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m benchmarks.gpu.sanitize || code=$?
    report "$tool" "$code" "$tool" $((code == 0 ? 1 : 30))
  done
}

rows() {
  local code=0 options=(-m gpu --benchmark-only --save-results --results-dir "$OUT")
  if ((DRY_RUN)); then
    # Interpreted, the Triton backend can be named without a GPU; nothing is launched.
    TRITON_INTERPRET=1 limited "$(left 10)" rows "$PYTHON" -m benchmarks.gpu.dry_run || code=$?
    report "rows, on shapes" "$code" rows 1000
    return
  fi
  # Status 1 is that of rows that say why they have no time: the table shows them.
  limited "$(left 20)" rows "$PYTHON" -m pytest benchmarks "${options[@]}" \
    --case-seconds 60 -q -rN || code=$?
  report rows $((code == 1 ? 0 : code)) rows $((code > 1 ? 30 : 0))
}

mkdir -p "$OUT"
touch "$OUT/gpu-rows.log"
peers
for step in $STEPS; do
  case $step in
    build | tests | sanitize | rows) "$step" ;;
    *) echo "STEPS: build, tests, sanitize or rows, got '$step'" && exit 2 ;;
  esac
done
if ((!DRY_RUN)); then
  "$PYTHON" -m benchmarks.gpu.summary "$OUT" || status=1
fi
echo "run.sh took ${SECONDS} s"
exit "$status"
