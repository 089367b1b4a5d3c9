#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests that reach native code
# without PyTorch. Usage: tests/native/sanitize.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."

bin=$PWD/.venv/bin
build=build/sanitize
site=$PWD/$build/site
PATH="$bin:$PATH"

cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS_DEBUG="-O1 -g1" -DDGEMMA_PYTHON=ON \
    -DDGEMMA_SANITIZE=address,undefined -DPython_EXECUTABLE="$bin/python" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" >>"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
rm -rf "$site"
mkdir -p "$site"
cp -r python/dgemma convert/dgemma_convert "$site"
rm -f "$site"/dgemma/*.so
cmake --install "$build" --prefix "$site" --component python >/dev/null

# The sanitizers' runtime must come first in a process whose own program was not built with it. Python itself leaks.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1
if [ $# -eq 0 ]; then
    set -- tests/engine/test_{gguf_reader,hostile_files,hostile_shards,session_files}.py \
        tests/quant/test_{quant,arguments}.py tests/python/test_api.py
fi
exec "$bin/python" -m pytest -q -p no:cacheprovider "$@"
