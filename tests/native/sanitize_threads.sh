#!/usr/bin/env bash
# Builds the engine with ThreadSanitizer and runs several sessions at once. Usage: tests/native/sanitize_threads.sh MODEL.gguf
set -euo pipefail
cd "$(dirname "$0")/../.."

build=build/sanitize-threads
PATH="$PWD/.venv/bin:$PATH"
{
    cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS_DEBUG="-O1 -g1" -DDGEMMA_TESTS=ON \
        -DDGEMMA_SANITIZE=thread
    cmake --build "$build" --target dgemma_concurrent
} > "$build.log" 2>&1 || { cat "$build.log"; exit 1; }

# The sanitizer wants its addresses where it expects them: without randomisation, where the system can do without.
fixed=()
if setarch "$(uname -m)" -R true 2> /dev/null; then fixed=(setarch "$(uname -m)" -R); fi
TSAN_OPTIONS=halt_on_error=1 "${fixed[@]}" "$build/tests/native/dgemma_concurrent" "$1"
