#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: importing the configuration class of a model loads PyTorch's compiler and its distributed tensors.
#
# Expected: a class with the fields of config.json needs neither, and `from transformers import AutoConfig` loads neither.
# Seen: `from transformers import LlamaConfig`, as AutoConfig.from_pretrained does, imports transformers.utils.type_validators, which imports
# transformers.activations, then transformers.integrations.hub_kernels, and so torch._dynamo, torch.distributed.tensor and sympy: 900
# modules more. Every program that reads a checkpoint's configuration starts seconds later.
#
# Installs both packages in a temporary folder. Exits with 1 if the behaviour changes. Times are printed and not compared.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

begun = time.perf_counter()
import torch

of_torch = time.perf_counter() - begun
from transformers import AutoConfig

heavy = "torch._dynamo", "torch.distributed.tensor", "sympy"
before, modules, begun = [name in sys.modules for name in heavy], len(sys.modules), time.perf_counter()
from transformers import LlamaConfig

took = time.perf_counter() - begun
after = [name in sys.modules for name in heavy]
print("torch %.1f s; LlamaConfig %.1f s and %d modules" % (of_torch, took, len(sys.modules) - modules))
print("before, after:", *zip(heavy, before, after))
sys.exit(before != [False] * 3 or after != [True] * 3)
PYTHON
