#!/usr/bin/env bash
# Every benchmark with the settings of docs/benchmarks/, one after the other; some hours on two cores.
#
# PARE_BENCH_DATA   folder with resnet20_cifar10.pt2, cifar10_train.npz and cifar10_test.npz; without it those that need them are left out
# PYTHON            the interpreter of the environment that `make install-dev` makes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

bench() {
  printf '\n== python benchmarks/%s\n' "$*"
  "$python" "benchmarks/$1" "${@:2}"
}

bench upload_memory.py --mebibytes 1024
if command -v nginx >/dev/null; then
  bench load --soak-minutes 10
else
  echo "nginx is missing: the load benchmark is left out" >&2
fi
bench warm_start.py --jobs 15
bench minilm_int8.py build "$work"
bench minilm_int8.py measure "$work" --seconds 60
bench low_rank.py --threads 1
bench wanda.py --threads 1
bench weight_quantization.py --model lm --threads 1
bench weight_quantization.py --model minilm --threads 1
bench codes_in_torch.py --models decoder minilm --num-runs 10
bench mixed_precision.py --models minilm --held-out 300
bench layer_by_layer_memory.py --threads 1
bench training_speed.py
bench compiled.py
bench parallel_training.py
if [ -n "${PARE_BENCH_DATA:-}" ]; then
  bench structured_pruning.py latency
  bench structured_pruning.py accuracy --epochs 3
  bench deep_compression.py dense
  bench deep_compression.py compressed
  bench mixed_precision.py --models resnet20
  bench distillation.py student --images 2000 --epochs 30
  bench distillation.py repair --epochs 4
  bench libraries.py
else
  echo "PARE_BENCH_DATA is not set: the benchmarks on CIFAR-10 are left out" >&2
fi
