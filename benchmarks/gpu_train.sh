#!/bin/bash
# How much can be trained in minutes? One run of at most nine minutes on a machine with one GPU:
#
#     DATA=DIR benchmarks/gpu_train.sh OUT_DIR              writes logs, record.json and weights to OUT_DIR
#     DATA=DIR benchmarks/gpu_train.sh OUT_DIR --resume     a further piece of a run, from the files in OUT_DIR
#     DATA=DIR benchmarks/gpu_train.sh OUT_DIR --small      a trial; with GPU=cpu in the environment, without a GPU
#
# DIR holds CIFAR-10 as the official binary files, or an archive with an unpack.py that writes them: `unpack.py OUTPUT_DIR`,
# run with the folders of unpacked wheels DIR/wheels on its path. Nothing is installed: the package is copied to a
# temporary folder in its installed layout. SECONDS_LIMIT: of all (530). RECORD: of the record run (400); CRM: of CIFAR-10
# 6C2F with the preset of certified radius maximisation (160), CRM_EPOCHS (120). With MNIST=DIR (its official files) also
# MNIST 4C3F, MNIST_LIMIT (100), MNIST_EPOCHS (60). SECTIONS: which of "record crm mnist"; crm and mnist have folders of
# their own in OUT_DIR, go on from their last checkpoints when started again, and are only proved once they are finished.
# RECORD_OPTIONS: further options of benchmarks/record.py. PYTHON: the interpreter (python3).
#
# Operations and bytes of the record run (a symmetric LipNeXt, 2 layers of 128 channels at 16 x 16, 6 of 512 at 8 x 8,
# 2048 features, 2 dense layers, 19.7 million weights): an image takes 0.19e9 operations forward and three times as
# many in a step, an epoch of 50 000 images 2.8e13, which is 0.1 s at 400 TFLOP/s in bfloat16. Each layer reads and
# writes 32 768 values an image, about 14 times a step: 7.3 MB, 0.37 TB an epoch, 0.1 s at 4 TB/s. The orthonormal
# matrices turn by some 24 products each and step, the two pairs of 4096 x 1024 behind the windows above all: 9.2e11
# operations, 9e13 in the 97 steps of an epoch, three quarters of them (the directions) in bfloat16, a twentieth in full
# float32: 0.25 s. So the turning bounds it; larger batches make it cheaper. No GPU has run this network yet: that of
# results/record-h200.md (4 layers of 256 and 12 of 1024 channels, 512 features, not symmetric) takes 1.33 s an epoch on
# an H200; the same reckoning, with directions in float32, says 1.4 s.
#
# Of 6C2F: 18e6 multiplications forward an image, three times as many in a step, two operations each: 5.4e12 an epoch, 0.1 s
# at 50 TFLOP/s. An image's activations are 0.2 MB, moved some ten times: 0.1 TB, 0.04 s. The rest of the 0.46 s measured on
# an H200 are hundreds of small kernels a step, of the power iteration above all.
case ${1:---help} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;; esac
set -u
OUT=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
DATA=$(cd "${DATA:?the folder of CIFAR-10}" && pwd) || exit 2
[ -z "${MNIST:-}" ] || MNIST=$(cd "$MNIST" && pwd) || exit 2
END=$(($(date +%s) + ${SECONDS_LIMIT:-530}))
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
cp -r "$ROOT/lipbounds" "$ROOT/benchmarks" "$ROOT/pyproject.toml" "$SITE/"
cp -r "$ROOT/training" "$ROOT/analysis" "$SITE/lipbounds/"
cd "$SITE" || exit 2
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.8 JAX_PLATFORMS=${GPU:-cuda}
MODE=${2:-}
RESUME=""; [ "$MODE" = "--resume" ] && RESUME="--resume"
SMALL=""
[ "$MODE" = "--small" ] && SMALL="--depths 1 1 --width 8 --features 64 --batch 64 --images 1280 --tests 500 \
    --every 20 --reserve 60"

FILES=$DATA
if ! find "$DATA" -name test_batch.bin | grep -q .; then
    FILES=$SITE/data
    mkdir -p "$FILES"
    (PYTHONPATH=$(echo "$DATA"/wheels/* | tr ' ' ':'):${PYTHONPATH} $PYTHON "$DATA/unpack.py" "$SITE/unpacked" \
        > "$OUT/unpack.log" 2>&1 && mv "$SITE"/unpacked/* "$FILES/") &
fi

section() { # NAME LIMIT COMMAND...
    local name=$1 limit=$2 start code left
    shift 2
    case " ${SECTIONS:-record crm mnist} " in *" $name "*) ;; *) return ;; esac
    start=$(date +%s)
    left=$((END - start - 3))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 20 ]; then echo "== $name: not run, $limit s left"; return; fi
    LIMIT=$limit timeout -k 3 "$limit" "$@" 2>&1 < /dev/null | tee "$OUT/$name.log" | cut -c 1-600
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code, $(($(date +%s) - start)) s"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
record() { # ends by itself some seconds before its limit
    $PYTHON benchmarks/record.py --data-dir "$FILES" --out "$OUT" --seconds $((LIMIT - 20)) $RESUME $SMALL \
        ${RECORD_OPTIONS:-}
}
crm() { # certified radius maximisation; goes on, or only proves, where $OUT/crm has a run
    local batch
    until batch=$(find "$FILES" -name test_batch.bin | grep .); do sleep 1; done
    $PYTHON benchmarks/crm_record.py --preset cifar10-6C2F --epochs "${CRM_EPOCHS:-$([ -n "$SMALL" ] && echo 2 || echo 120)}" \
        --data-dir "$(dirname "$batch")" --out "$OUT/crm" \
        --settings "$([ -n "$SMALL" ] && echo '{"arch": "2C2F", "refresh": 8, "ramp": 1, "degrees": 0, "translate": 0}' || echo '{}')"
}
mnist() {
    $PYTHON benchmarks/crm_record.py --preset mnist-4C3F --epochs "${MNIST_EPOCHS:-$([ -n "$SMALL" ] && echo 1 || echo 60)}" \
        --data-dir "$MNIST" --out "$OUT/mnist" \
        --settings "$([ -n "$SMALL" ] && echo '{"arch": "2C2F", "refresh": 8}' || echo '{}')"
}
export -f record crm mnist
export PYTHON FILES OUT RESUME SMALL RECORD_OPTIONS CRM_EPOCHS MNIST MNIST_EPOCHS
section record "${RECORD:-400}" bash -c record
section crm "${CRM:-160}" bash -c crm
[ -z "${MNIST:-}" ] || section mnist "${MNIST_LIMIT:-100}" bash -c mnist
wait
