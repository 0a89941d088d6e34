#!/usr/bin/env bash
# Everything that only a GPU can say, part by part: the tests there, and the tables of docs/engine.md and docs/planning.md.
#
#   bash bench/gpu.sh OUT tests                    # 3 minutes
#   bash bench/gpu.sh OUT exact shapes plan load   # 1, 4, 1 and 3 minutes
#   bash bench/gpu.sh OUT generate                 # 5 minutes
#   bash bench/gpu.sh OUT serve                    # mixed adapters on an 8B base, and Transformers' own batching
#   bash bench/gpu.sh OUT verify TOKENIZER         # 2 minutes; a folder with tokenizer and chat template
#   bash bench/gpu.sh OUT replays tokens.npz       # 5 minutes; tokens as bench/peers.py writes them
#   bash bench/gpu.sh OUT memory small             # 1 to 5 minutes; a group of bench/memory.py
#   bash bench/gpu.sh OUT curve gsm8k.jsonl [smollm2.gguf]
#
# A part that fails does not keep the others from running; OUT/log.txt has what each printed, and OUT the results.
# python3 must import veneer and, for tests, pytest. `verify` and `load` make 16 GB of random weights in /tmp.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$1; shift
mkdir -p "$OUT"
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"

part() {  # name, seconds at most, command
  local name=$1 limit=$2 began=$SECONDS; shift 2
  echo "== $name: $*" | tee -a "$OUT/log.txt"
  timeout --signal INT --kill-after 20 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"
  echo "== $name: exit ${PIPESTATUS[0]} after $((SECONDS - began)) s" | tee -a "$OUT/log.txt"
}

while (($#)); do
  what=$1; shift
  case $what in
    tests)
      # Side by side: most of it is compiling.
      for file in test_engines test_load test_cuda test_memory test_predict test_generation test_serving; do
        part "$file" 300 python3 -m pytest "tests/gpu/$file.py" --tb=short --durations=5 &
      done
      for some in any_rank bfloat16_errs "not any_rank and not bfloat16_errs"; do
        part "test_fused: $some" 300 python3 -m pytest tests/gpu/test_fused.py --tb=short --durations=5 -k "$some" &
      done
      wait ;;
    shapes)
      for shape in 1b qwen3-8b gemma2-9b; do
        part "$shape" 240 python3 -m bench.engine --shape "$shape" --out "$OUT/engine.json" \
          --cases 4x2048@70 4x2048@11 2x1024x8@70 1x2048@70 2x8192@20
      done ;;
    exact) part exact 200 python3 -m bench.exact --out "$OUT/exact.json" ;;
    plan) part plan 240 python3 -m bench.plan gpu --engine fused --out "$OUT" ;;
    load) part load 400 python3 -m bench.load --shape 8B --folder /tmp/base-8b --out "$OUT/load.json" ;;
    verify)
      tokenizer=$1; shift
      part verify 240 python3 -m bench.verify --folder /tmp/base-8b --tokenizer "$tokenizer" --out "$OUT/verify.json" ;;
    replays)
      tokens=$1; shift
      for shape in 1b 8b; do
        part "replays $shape" 240 python3 -m bench.replays "$tokens" --shape "$shape" --steps 16 --out "$OUT/replays.json"
      done ;;
    memory)
      group=$1; shift
      cp -n bench/results/memory.json "$OUT" 2>/dev/null
      part "memory $group" 590 python3 -m bench.memory --group "$group" --out "$OUT/memory.json" ;;
    serve) part serve 590 python3 -m bench.serve gpu --out "$OUT/serve.json" ;;
    generate) part generate 500 python3 -m bench.generate --out "$OUT/generate.json" ;;
    curve)
      data=$1; shift
      model=(); [[ ${1:-} == *.gguf ]] && { model=(--smollm2 "$1"); shift; }
      part curve 300 python3 -m bench.curve "$data" --steps 200 "${model[@]}"
      cp bench/results/curve.json bench/results/curve.png "$OUT" ;;
    *) echo "$what: not known; see the first lines of this file" >&2; exit 2 ;;
  esac
done
