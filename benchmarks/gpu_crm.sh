#!/bin/bash
# Certified radius maximisation with the presets on a machine with one GPU, about four minutes:
#
#     DATA=DIR benchmarks/gpu_crm.sh OUT_DIR             CIFAR-10 6C2F, then with MNIST=DIR also MNIST 4C3F
#     DATA=DIR benchmarks/gpu_crm.sh OUT_DIR --small     a trial; with GPU=cpu in the environment, without a GPU
#
# DIR holds CIFAR-10 as the official binary files, or an archive with an unpack.py that writes them: `unpack.py
# OUTPUT_DIR`, run with the folders of unpacked wheels DIR/wheels on its path. Nothing is installed: the package is copied
# to a temporary folder in its installed layout. OUT_DIR/cifar10 and OUT_DIR/mnist have record.md, record.json and the
# run; started again, a run goes on from its last checkpoint, and a finished one is only proved again. LIMIT: seconds for
# CIFAR-10 (200), half of that for MNIST. EPOCHS (150) and MNIST_EPOCHS (60). PYTHON: the interpreter (python3).
#
# Operations of an epoch of 6C2F: 18e6 multiplications forward an image, three times as many in a step, two operations
# each: 5.4e12, 0.1 s at 50 TFLOP/s. An image's activations are 0.2 MB, moved some ten times: 0.1 TB, 0.04 s. The rest of
# the 0.46 s measured on an H200 are hundreds of small kernels a step, of the power iteration above all.
set -u
OUT=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
DATA=$(cd "${DATA:?the folder of CIFAR-10}" && pwd) || exit 2
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
cp -r "$ROOT/lipbounds" "$ROOT/benchmarks" "$ROOT/pyproject.toml" "$SITE/"
cp -r "$ROOT/training" "$ROOT/analysis" "$SITE/lipbounds/"
cd "$SITE" || exit 2
export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_PLATFORMS=${GPU:-cuda}
LIMIT=${LIMIT:-200}
SMALL=(); MNIST_SMALL=()
if [ "${2:-}" = "--small" ]; then
    EPOCHS=2; MNIST_EPOCHS=1; LIMIT=${SMALL_LIMIT:-600}
    SMALL=(--settings '{"arch": "2C2F", "refresh": 8, "ramp": 1, "degrees": 0.0, "translate": 0.0}')
    MNIST_SMALL=(--settings '{"arch": "2C2F", "refresh": 8}')
fi

FILES=$(find "$DATA" -name test_batch.bin -printf '%h\n' 2>/dev/null | head -n 1)
if [ -z "$FILES" ]; then
    PYTHONPATH=$(echo "$DATA"/wheels/* | tr ' ' ':'):$PYTHONPATH $PYTHON "$DATA/unpack.py" "$SITE/data" > "$OUT/unpack.log" 2>&1
    FILES=$(find "$SITE/data" -name test_batch.bin -printf '%h\n' | head -n 1)
fi

part() { # NAME LIMIT ARGUMENTS...
    local name=$1 limit=$2 start code
    shift 2
    start=$(date +%s)
    timeout -k 3 "$limit" $PYTHON benchmarks/crm_record.py --out "$OUT/$name" "$@" 2>&1 < /dev/null |
        tee -a "$OUT/$name.log" | cut -c 1-400
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code, $(($(date +%s) - start)) s"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
part cifar10 "$LIMIT" --preset cifar10-6C2F --epochs "${EPOCHS:-150}" --data-dir "$FILES" "${SMALL[@]}"
[ -z "${MNIST:-}" ] ||
    part mnist $((LIMIT / 2)) --preset mnist-4C3F --epochs "${MNIST_EPOCHS:-60}" --data-dir "$MNIST" "${MNIST_SMALL[@]}"
