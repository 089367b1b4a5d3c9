#!/usr/bin/env bash
# Builds the fuzz targets under AddressSanitizer and UBSan, and gives each RUNS runs or SECONDS_EACH seconds: README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=build/fuzz
runs=${RUNS:-20000}
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(fuzz_gguf fuzz_session fuzz_model)

PATH="$PWD/.venv/bin:$PATH"
command -v cmake > /dev/null || python3 -m pip install --quiet cmake

sanitizers=address,undefined
cc=${CC:-}
# A clang may come without libFuzzer's runtime: try it.
if [ -z "$cc" ] && echo 'int LLVMFuzzerTestOneInput(const char *d, long n) { return 0; }' |
    clang -w -fsanitize=fuzzer,$sanitizers -x c - -o /dev/null 2> /dev/null; then
    cc=clang
    sanitizers=fuzzer,$sanitizers
fi
cmake -S . -B $build -DCMAKE_C_COMPILER="${cc:-cc}" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS_DEBUG="-O1 -g1" \
    -DDGEMMA_FUZZ=ON -DDGEMMA_FUZZ_SANITIZE=$sanitizers > /dev/null
cmake --build $build --parallel "$(getconf _NPROCESSORS_ONLN)" --target "${targets[@]}"

export DGEMMA_FUZZ_MODEL=$PWD/$build/model.gguf
PYTHONPATH=tests python -c "import pathlib, sys, support.small_model as m; m.write(pathlib.Path(sys.argv[1]))" "$DGEMMA_FUZZ_MODEL"

for target in "${targets[@]}"; do
    corpus=tests/fuzz/corpus/${target#fuzz_}
    found=$build/found/${target#fuzz_}
    log=$build/$target.log
    mkdir -p "$found"
    if [[ $sanitizers != fuzzer* ]]; then
        echo "$target: $($build/tests/fuzz/$target -runs="$runs" -seed=1 "$corpus")"
        continue
    fi
    options=(-runs="$runs" -seed=1 -max_len=16384 -artifact_prefix="$found/" -print_final_stats=1)
    [ -z "${SECONDS_EACH:-}" ] || options+=(-runs=-1 -max_total_time="$SECONDS_EACH")
    [ "$target" != fuzz_gguf ] || options+=(-dict=tests/fuzz/gguf.dict)
    [ "$target" != fuzz_model ] || options+=(-max_len=144) # a list of 24 changes
    # New inputs go to the first folder: the committed corpus stays as it is.
    if ! $build/tests/fuzz/$target "${options[@]}" "$found" "$corpus" > "$log" 2>&1; then
        tail -40 "$log"
        echo "$target: found something: its input is in $found, all that was said in $log"
        exit 1
    fi
    awk -v target="$target" '/ cov: / { for (i = 1; i < NF; i++) { if ($i == "cov:") edges = $(i + 1)
                                                                if ($i == "corp:") corpus = $(i + 1) } }
        /^INFO: Loaded .*counters/ { match($0, /[0-9]+ inline/); all = substr($0, RSTART, RLENGTH - 7) }
        /number_of_executed_units/ { runs = $2 } /average_exec_per_sec/ { rate = $2 }
        END { sub("/.*", "", corpus)
              printf "%s: %d executions, %d a second; %d of %d edges; a corpus of %d inputs; nothing found\n",
                     target, runs, rate, edges, all, corpus }' "$log"
done
