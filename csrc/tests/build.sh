#!/bin/sh
# Build the check of the kernels: build.sh PROGRAM COMPILER [OPTIONS...]
set -eu
cd "$(dirname "$0")/.."
program=$1
shift
avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mgfni -mfma -Wno-uninitialized -Wno-maybe-uninitialized"
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
for source in lookup*.cpp rows*.cpp prepare.cpp memory.cpp processor.cpp parallel.cpp tests/check_*.cpp; do
    case $("$1" -dumpmachine)/$source in
    x86_64*/*_avx2.cpp) options="-mavx2 -mfma -mf16c" ;;
    x86_64*/*_avx512.cpp) options=$avx512 ;;
    x86_64*/*_avx512bf16.cpp)
        options=$avx512
        ! "$1" -mavx512bf16 -fsyntax-only -x c++ /dev/null 2>/dev/null || options="$avx512 -mavx512bf16"
        ;;
    *) options="" ;;
    esac
    # shellcheck disable=SC2086
    "$@" -std=c++17 -O2 -Wall -Wextra $options -c "$source" -o "$objects/$(basename "$source").o"
done
mkdir -p "$(dirname "$program")"
"$@" "$objects"/*.o -o "$program" -ldl -pthread
