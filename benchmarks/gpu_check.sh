#!/usr/bin/env bash
# All that a GPU at hand for fifteen minutes must answer, in one command of at most nine:
#
#     OUT=results bash benchmarks/gpu_check.sh --images CIFAR        (CIFAR: see gpu_run.py; without it there is no run)
#     OUT=results bash benchmarks/gpu_check.sh --rehearse            on a CPU: tiny sizes, kernels interpreted
#
# The doctor; values of every variant of the kernel against float64; bandwidth, products, convolutions and scans;
# training steps; sampling; a real run on CIFAR-10 with the time that is left. Each step has a process and a limit of
# its own, and the next one follows whatever became of it. $OUT gets a JSON file a step, samples.png, logs.tar.gz (a
# log a step) and table.txt, eight files in all, each written as soon as there is something to write. Exit code 1 if a
# step failed.
#
# It needs Python 3.11 or newer with jax, flax, optax, orbax-checkpoint, scipy, Pillow, tqdm and jaxtyping.
# PYTHON names the interpreter, SECONDS_IN_ALL the time, CACHE a folder that keeps compiled programs for the next time.
# --only STEP (several, too) leaves out the others, --fail STEP (several, too) makes that step fail.
set -uo pipefail

usage() { echo "gpu_check.sh: $1; see the head of $0" >&2; exit 2; }
STEPS="doctor values speed training sampling run" REHEARSE= FAIL= ONLY= IMAGES=
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) REHEARSE=--rehearse; shift ;;
    --fail|--only) [[ -n ${2:-} && " $STEPS " == *" $2 "* ]] || usage "$1 must be one of $STEPS, found '${2:-}'"
      [ "$1" = --fail ] && FAIL+=" $2 " || ONLY+=" $2 "; shift 2 ;;
    --images) [ -e "${2:-}" ] || usage "--images must be a folder or an archive, found '${2:-}'"
      IMAGES=$(realpath "$2"); shift 2 ;;
    *) usage "the options are --images CIFAR, --rehearse, --only STEP and --fail STEP, found '$1'" ;;
  esac
done
OUT=${OUT:-gpu_check_results}
PYTHON=$(command -v "${PYTHON:-python3}") || usage "PYTHON must be an interpreter, found '${PYTHON:-python3}'"
[ ! -e "$OUT/table.txt" ] || usage "$OUT has results already: choose another OUT"
mkdir -p "$OUT" || exit 2
OUT=$(realpath "$OUT") PYTHON=$(realpath -s "$PYTHON")
cd "$(dirname "$0")/.."
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir "$WORK/logs"
END=$(($(date +%s) + ${SECONDS_IN_ALL:-530}))
RUN_SECONDS=130  # what is kept for the run, whatever the steps before it take
[[ -z $ONLY || $ONLY == *" run "* ]] || RUN_SECONDS=5

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${CACHE:-$WORK/cache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5  # one for all steps
if [ -n "$REHEARSE" ]; then
  # the interpreter needs a thread for each warpgroup that waits: as many as there are devices
  export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  END=$(($(date +%s) + ${SECONDS_IN_ALL:-3000}))
elif [[ $($PYTHON -c 'import importlib.metadata as m; print(m.version("jax"))') == 0.11.* ]]; then
  # 0.11 computes products that are saved for the backward pass twice, under cuBLAS, with it
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_dynamic_slice_fusion=false"
fi

left() { echo $((END - $(date +%s))); }
table() { $PYTHON benchmarks/gpu_table.py "$OUT" "$WORK/steps.tsv" > "$OUT/table.txt" || true; }

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, and leaves RUN_SECONDS to the run
step() {
  local name=$1 limit=$2 log=$WORK/logs/$1.log start code
  shift 2
  [[ -z $ONLY || $ONLY == *" $name "* ]] || return 0
  [ "$name" = run ] || [ "$limit" -le $(($(left) - RUN_SECONDS)) ] || limit=$(($(left) - RUN_SECONDS))
  echo "== $name, at most $limit s"
  start=$(date +%s)
  if [ "$limit" -lt 5 ]; then
    echo "no time was left for it" | tee "$log"; code=124
  elif [[ $FAIL == *" $name "* ]]; then
    echo "made to fail by --fail" | tee "$log"; code=1
  else
    timeout -k 5 "$limit" "$@" 2>&1 | sed -u 's/\r/\n/g' | tee "$log"; code=${PIPESTATUS[0]}
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$(($(date +%s) - start))" "$limit" >> "$WORK/steps.tsv"
  tar czf "$OUT/logs.tar.gz" -C "$WORK" logs
  table
}

MODELS="--models configs/gspn_xl_2.py configs/dit_xl_2.py configs/gspn_l_2.py"
SAMPLED="--models configs/gspn_l_2.py configs/dit_xl_2.py"
SHAPE="--batch-size 64 --image-size 32 --channels 4"
SAMPLER_STEPS=20
if [ -n "$REHEARSE" ]; then
  MODELS="--models GSPN-S/2:hidden=64,depth=2 DiT-S/2:hidden=64,depth=2,heads=2"
  SAMPLED=$MODELS SHAPE="--batch-size 8 --image-size 8 --channels 4" SAMPLER_STEPS=2
fi
LONG=$([ -n "$REHEARSE" ] && echo 20 || echo 1)  # a rehearsal has no hurry

step doctor $((80 * LONG)) $PYTHON -m gspn_jax.doctor
step values $((90 * LONG)) $PYTHON benchmarks/gpu_values.py $REHEARSE --limit $((80 * LONG)) --out "$OUT/values.json"
step speed $((100 * LONG)) $PYTHON benchmarks/gpu_operator.py ${REHEARSE:---quick} --values "$OUT/values.json" \
  --anyway --repeats $([ -n "$REHEARSE" ] && echo 1 || echo 10) --out "$OUT/speed.json"
step training $((180 * LONG)) $PYTHON benchmarks/train_step.py $MODELS $SHAPE --measure training \
  --together --trace --limit $((170 * LONG)) --out "$OUT/training.json"
step sampling $((90 * LONG)) $PYTHON benchmarks/train_step.py $SAMPLED $SHAPE --measure sampling \
  --sampler-steps $SAMPLER_STEPS --together --trace --limit $((80 * LONG)) --out "$OUT/sampling.json"
if [ -n "$IMAGES$REHEARSE" ]; then  # a rehearsal makes images up
  step run $(($(left) - 8)) $PYTHON benchmarks/gpu_run.py $REHEARSE ${IMAGES:+--images "$IMAGES"} \
    --seconds $(($(left) - 20)) --out "$OUT/run.json" --grid "$OUT/samples.png"
elif [[ -z $ONLY || $ONLY == *" run "* ]]; then
  printf 'run\tno images were named\t0\t0\n' >> "$WORK/steps.tsv"
  table
fi
cat "$OUT/table.txt"
$PYTHON benchmarks/gpu_table.py "$OUT" "$WORK/steps.tsv" > /dev/null
