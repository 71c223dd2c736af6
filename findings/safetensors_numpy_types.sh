#!/usr/bin/env bash
# safetensors 0.8.0 with NumPy 2.4.6: whether a file can be read depends on what the program imported before, and its 8-bit floats cannot be.
#
# Expected: safe_open(file, framework="np") reads every type that it lists in the file's header, or refuses it by name.
# Seen: a bfloat16 tensor raises TypeError until any part of the program has imported ml_dtypes, which registers the type's name with
# NumPy; then the same call reads it. A float8 tensor (F8_E4M3, as in FP8 checkpoints) raises AttributeError also then, because the type is
# looked up as an attribute of the module numpy. And a slice that ends beyond the tensor is an error here, while NumPy clips it.
#
# Installs the packages in a temporary folder. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

from safetensors import safe_open

header = {
    "half": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    "eighth": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [4, 8]},
    "whole": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
}
text = json.dumps(header).encode()
with open("small.safetensors", "wb") as file:  # 1 and 2 in bfloat16, four times 1 in float8, 1 in float32
    file.write(len(text).to_bytes(8, "little") + text + bytes.fromhex("803f 0040 38383838 0000803f"))


def read(name, end=None):
    with safe_open("small.safetensors", framework="np") as file:
        try:
            found = file.get_tensor(name) if end is None else file.get_slice(name)[:end]
            return [float(x) for x in found]
        except Exception as error:
            return type(error).__name__


seen = [read("half"), read("eighth")]
import ml_dtypes  # noqa: E402, F401

seen += [read("half"), read("eighth"), read("whole"), read("whole", 9)]
names = "bfloat16", "float8", "bfloat16, ml_dtypes imported", "float8, ml_dtypes imported", "float32", "float32, a longer slice"
for name, what in zip(names, seen):
    print(f"{name}: {what}")
sys.exit(seen != ["TypeError", "AttributeError", [1.0, 2.0], "AttributeError", [1.0], "SafetensorError"])
PYTHON
