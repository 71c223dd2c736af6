#!/usr/bin/env bash
# OpenVINO 2026.4.1: INFERENCE_PRECISION_HINT bf16 is accepted on a CPU without bfloat16, and is then many times slower than f32.
#
# Expected: a hint that the processor cannot serve is replaced by f32, or refused; OPTIMIZATION_CAPABILITIES does not list BF16 there.
# Seen: the compiled model says that it computes in bfloat16, its results are rounded so, and eight layers of 1024 x 1024 take 4 times as long
# with 1 row, 30 times with 16 and 60 times with 128 (Xeon with AVX-512 and VNNI, one thread).
#
# Installs the package in a temporary folder. Exits with 1 if the behaviour changes, and with 0 on a CPU that lists BF16, where there is
# nothing to see.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check openvino==2026.4.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time
from statistics import median

import numpy as np
import openvino as ov
from openvino import opset13 as op

WIDTH, LAYERS, ROUNDS = 1024, 8, 7
core = ov.Core()
able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
print("OPTIMIZATION_CAPABILITIES", able)
if "BF16" in able:
    print("this CPU computes in bfloat16: nothing to see")
    sys.exit(0)

draw = np.random.default_rng(0)
x = h = op.parameter([-1, WIDTH], np.float32)
for _ in range(LAYERS):
    weights = op.constant((draw.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32))
    h = op.relu(op.matmul(h, weights, False, True))
model = ov.Model([h], [x])
common = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
compiled = {hint: core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint, **common}) for hint in ("f32", "bf16")}
used = compiled["bf16"].get_property("INFERENCE_PRECISION_HINT").get_type_name()
print("asked for bf16, the compiled model says", used)
requests = {hint: one.create_infer_request() for hint, one in compiled.items()}
slower = {}
for rows in (1, 16, 128):
    given, times, out = np.ones((rows, WIDTH), np.float32), {hint: [] for hint in requests}, {}
    for _ in range(ROUNDS):  # in turns
        for hint, request in requests.items():
            began = time.perf_counter()
            out[hint] = request.infer({0: given})[0].copy()
            times[hint].append(time.perf_counter() - began)
    f32, bf16 = (median(times[hint][1:]) for hint in ("f32", "bf16"))
    slower[rows] = bf16 / f32
    gap = np.abs(out["f32"] - out["bf16"]).max()
    print(f"{rows:3} rows: f32 {1e3 * f32:.1f} ms, bf16 {1e3 * bf16:.1f} ms, {slower[rows]:.1f} times; results differ by {gap:.1e}")
sys.exit(not (used == "bf16" and slower[1] > 1.5 and slower[16] > 5))
PYTHON
