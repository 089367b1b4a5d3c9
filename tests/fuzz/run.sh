#!/usr/bin/env bash
# Builds the fuzz targets under AddressSanitizer and UBSan, and gives each RUNS runs or SECONDS_EACH seconds: README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=build/fuzz
runs=${RUNS:-20000}
quick="canvas header options rows"
python_targets="batch body calls config importance index keys messages options request safetensors schema tools vocabulary"
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    for name in $quick gguf session model; do targets+=("fuzz_$name"); done
    for name in $python_targets; do targets+=("python_$name"); done
fi
compiled=()
for target in "${targets[@]}"; do [[ $target == python_* ]] || compiled+=("$target"); done

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
if [ ${#compiled[@]} -gt 0 ]; then
    cmake -S . -B $build -DCMAKE_C_COMPILER="${cc:-cc}" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS_DEBUG="-O1 -g1" \
        -DDGEMMA_FUZZ=ON -DDGEMMA_FUZZ_SANITIZE=$sanitizers > /dev/null
    cmake --build $build --parallel "$(getconf _NPROCESSORS_ONLN)" --target "${compiled[@]}"
fi
mkdir -p $build
export DGEMMA_FUZZ_MODEL=$PWD/$build/model.gguf
export ASAN_OPTIONS=${ASAN_OPTIONS:-malloc_context_size=8:quarantine_size_mb=32} # where from, and not too slowly
PYTHONPATH=tests python -c "import pathlib, sys, support.small_model as m; m.write(pathlib.Path(sys.argv[1]))" "$DGEMMA_FUZZ_MODEL"

# libFuzzer's last words in one line.
summary() {
    awk -v target="$1" '/ cov: / { for (i = 1; i < NF; i++) { if ($i == "cov:") edges = $(i + 1)
                                                                if ($i == "corp:") corpus = $(i + 1) } }
        /^INFO: Loaded .*counters/ { match($0, /[0-9]+ inline/); all += substr($0, RSTART, RLENGTH - 7) }
        /number_of_executed_units/ { runs = $2 } /average_exec_per_sec/ { rate = $2 }
        END { sub("/.*", "", corpus)
              printf "%s: %d executions, %d a second; %d edges%s; a corpus of %d inputs; nothing found\n",
                     target, runs, rate, edges, all ? " of " all : "", corpus }' "$2"
}

for target in "${targets[@]}"; do
    name=${target#fuzz_} name=${name#python_}
    found=$build/found/$target
    log=$build/$target.log
    mkdir -p "$found"
    corpus=()
    options=(-runs="$runs" -seed=1 -artifact_prefix="$found/" -print_final_stats=1)
    [ -z "${SECONDS_EACH:-}" ] || options+=(-runs=-1 -max_total_time="$SECONDS_EACH")
    if [[ $target == python_* ]]; then
        if ! python -c "import atheris" 2> /dev/null; then
            python tests/fuzz/fuzz_python.py "$name" -driver -runs="${RUNS:-2000}"
            continue
        fi
        command=(python tests/fuzz/fuzz_python.py "$name" -max_len=40000)
    else
        command=($build/tests/fuzz/"$target")
        corpus=("tests/fuzz/corpus/$([ "$name" = header ] && echo gguf || echo "$name")")
        if [[ $sanitizers != fuzzer* ]]; then
            echo "$target: $("${command[@]}" -runs="$runs" -seed=1 "${corpus[@]}")"
            continue
        fi
        # Lengths that hold all there is to hold: what is longer is slower and finds no more.
        case $name in
        model) options+=(-max_len=144) ;; # a list of 24 changes
        canvas | options) options+=(-max_len=200) ;;
        rows) options+=(-max_len=640) ;;
        header) options+=(-max_len=1024 -dict=tests/fuzz/gguf.dict) ;;
        gguf) options+=(-max_len=16384 -dict=tests/fuzz/gguf.dict) ;;
        *) options+=(-max_len=16384) ;;
        esac
    fi
    # New inputs go to the first folder: the committed corpus stays as it is.
    if ! "${command[@]}" "${options[@]}" "$found" "${corpus[@]}" > "$log" 2>&1; then
        tail -40 "$log"
        echo "$target: found something: its input is in $found, all that was said in $log"
        exit 1
    fi
    summary "$target" "$log"
done
