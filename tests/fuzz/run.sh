#!/usr/bin/env bash
# Builds the fuzz targets under AddressSanitizer and UBSan, and gives each RUNS runs: see README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=build/fuzz
runs=${RUNS:-20000}
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(fuzz_gguf fuzz_session)

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
[ -e "$DGEMMA_FUZZ_MODEL" ] || dgemma synth --preset tiny-random --type q8_0 --outfile "$DGEMMA_FUZZ_MODEL"

for target in "${targets[@]}"; do
    corpus=tests/fuzz/corpus/${target#fuzz_}
    found=$build/found/${target#fuzz_}
    mkdir -p "$found"
    echo "== $target"
    if [[ $sanitizers == fuzzer* ]]; then
        # New inputs go to the first folder: the committed corpus stays as it is.
        $build/tests/fuzz/$target -runs="$runs" -seed=1 -max_len=16384 -artifact_prefix="$found/" -verbosity=0 \
            -print_final_stats=1 "$found" "$corpus"
    else
        $build/tests/fuzz/$target -runs="$runs" -seed=1 "$corpus"
    fi
done
