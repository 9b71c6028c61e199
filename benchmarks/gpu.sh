#!/bin/bash
# Is everything sound on a GPU, and how fast is it? One run of about seven minutes on a machine with one GPU:
#
#     benchmarks/gpu.sh OUT_DIR             writes gpu.md and gpu.json, anew after every section
#     benchmarks/gpu.sh OUT_DIR --small     a trial; with GPU=cpu in the environment on a machine without one
#
# SECTIONS="lipsdp": only these sections, by their names below; the output of that one is shown as it comes.
# SECTIONS="data train final cold": the final bound of a run in its epochs, programs compiled ahead and not.
# Nothing is installed: the package is copied to a temporary folder in its installed layout. A section that fails or
# runs out of time is recorded and does not stop the others. PYTHON: the interpreter (python3); SECONDS_LIMIT: of all.
case ${1:---help} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -u
OUT=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
SMALL=""; [ "${2:-}" = "--small" ] && SMALL="--small"
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
GPU=${GPU:-cuda,cpu}
END=$(($(date +%s) + ${SECONDS_LIMIT:-440}))
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
WORK=$SITE/work
mkdir -p "$WORK"
cp -r "$ROOT/lipbounds" "$ROOT/tests" "$ROOT/benchmarks" "$ROOT/pyproject.toml" "$SITE/"
cp -r "$ROOT/training" "$ROOT/analysis" "$SITE/lipbounds/"
cd "$SITE" || exit 2
export PYTHONPATH=$SITE:$SITE/tests PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=$GPU
PART="$PYTHON benchmarks/gpu.py"
FAST="env JAX_DEFAULT_MATMUL_PRECISION=BF16_BF16_F32"
HOST="env JAX_PLATFORMS=cpu"
: > "$WORK/sections.tsv"

wanted() { case " ${SECTIONS:-$1} " in *" $1 "*) ;; *) return 1 ;; esac; }
section() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2 start code left
    wanted "$name" || return 0
    shift 2
    start=$(date +%s)
    left=$((END - start - 5))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then code="not run"; else
        if [ -n "${LIVE:-}" ]; then
            timeout -k 3 "$limit" "$@" 2>&1 < /dev/null | tee "$WORK/$name.log"
            code=${PIPESTATUS[0]}
        else
            timeout -k 3 "$limit" "$@" > "$WORK/$name.log" 2>&1 < /dev/null
            code=$?
        fi
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" $(($(date +%s) - start)) "$limit" >> "$WORK/sections.tsv"
    echo "== $name: exit code $code, $(($(date +%s) - start)) s"
    [ -f "$WORK/$name.log" ] && tail -n "${TAIL:-4}" "$WORK/$name.log" | cut -c 1-400
    flock "$WORK/lock" $PYTHON benchmarks/gpu_report.py "$WORK" "$OUT" || echo "no report after $name"
}

if [ -n "$SMALL" ]; then MINUTES=0.2; TESTS="-k on_a_device"; MANY=1; else
    MINUTES=1.1; TESTS=""; MANY=3; fi

echo "$($PYTHON -c 'import lipbounds as lb; print(lb.__version__, lb.__file__)')"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null

# 1. Sound? These take no part of the device for long, so they run side by side (one after the other in the trial).
side() { if [ -n "$SMALL" ]; then "$@"; else "$@" & fi; }
checked() { # NAME PREFIX...: bounds on the device, then the check, once the CPU's are there
    local name=$1
    wanted "bounds-$name" || return 0
    shift
    section "bounds-$name" 75 "$@" $PART bounds "$WORK/bounds-$name.json" $SMALL
    while [ -z "$SMALL" ] && [ "$(grep -c -e '^bounds-cpu' -e '^slopes' "$WORK/sections.tsv")" -lt 2 ]; do sleep 1; done
    section "check-$name" 40 $HOST $PART check "$WORK/bounds-cpu.json" "$WORK/slopes.json" \
        "$WORK/bounds-$name.json" "$WORK/check-$name.json"
}
traced() {
    section traces 45 $PART traces "$WORK/traces.json" $SMALL
    section traces-fast 45 $FAST $PART traces "$WORK/traces-fast.json" $SMALL
}
# Most of their time is compilation of small programs that run once.
export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_gpu_autotune_level=0"
side section bounds-cpu 75 $HOST $PART bounds "$WORK/bounds-cpu.json" $SMALL
side section slopes 75 $HOST $PART slopes "$WORK/slopes.json" $SMALL
side checked gpu
side checked fast $FAST
side traced
TAIL=12 side section fuzz 100 $PYTHON -m tests.fuzz --minutes $MINUTES --processes $MANY --seed 1
TAIL=12 side section fuzz-fast 100 $FAST $PYTHON -m tests.fuzz --minutes $MINUTES --processes $MANY --seed 2
TAIL=12 side section tests 100 $PYTHON -m pytest -q -p no:benchmark --maxfail=20 -n $MANY -p no:cacheprovider \
    tests/test_device.py tests/test_local_wide.py tests/test_precision.py tests/test_wide.py tests/test_norms.py tests/test_radius.py $TESTS
wait
unset XLA_FLAGS

# 2. Fast? LipSDP of 6C2F takes most of the time that it is given, and so runs only where SECTIONS asks for it. One after
# the other on the device; the CPU's turn at the verbs is beside the training, which needs few cores.
[ -n "${SECTIONS:-}" ] && LIVE=1 section lipsdp 320 $PART lipsdp "$WORK/lipsdp.json" $SMALL
section proofs 60 $PART proofs "$WORK/proofs.json" $SMALL
section steps 75 $PART steps "$WORK/steps.json" $SMALL
section speed-gpu 130 $PART speed "$WORK/speed-gpu.json" $SMALL
side section speed-cpu 150 $HOST $PART speed "$WORK/speed-cpu.json" $SMALL
section data 20 $HOST $PART data "$WORK/cifar10" $SMALL
TAIL=12 section train 110 $PYTHON -m lipbounds train crm --preset cifar10-6C2F --data-dir "$WORK/cifar10" \
    --epochs 3 --warmup 0 --validate-every 0 --out "$WORK/run" ${SMALL:+--arch 3072-16-10 --batch-size 64}
section final 90 $PYTHON benchmarks/gpu_final.py "$WORK/final.json" "$WORK/run" $SMALL
section cold 90 $PYTHON benchmarks/gpu_final.py "$WORK/cold.json" "$WORK/run" --cold $SMALL
wait
echo
sed '/^## End of/,$d' "$OUT/gpu.md"
