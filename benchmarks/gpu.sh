#!/bin/sh
# Everything worth knowing from ten minutes of one GPU, in one JSON file: sh benchmarks/gpu.sh [PARTS] [--json FILE]
# [--seconds N]. A part that fails costs only itself. PYTHON: the interpreter; default .venv's, else python3.
cd "$(dirname "$0")/.." || exit
[ -n "$PYTHON" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; }
exec "${PYTHON:-python3}" -m benchmarks.gpu --device cuda "$@"
