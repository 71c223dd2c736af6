#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: a rope_scaling that is added to a config.json which transformers itself wrote drops the base of
# the rotary frequencies, without a warning.
#
# Expected: model cards of Qwen say how to read longer texts: add "rope_scaling" with YaRN to config.json. The base, rope_theta = 1000000,
# stays as it was. Configs of transformers 4 hold it at the top, and there it does.
# Seen: transformers 5 writes the base within "rope_parameters". A "rope_scaling" beside that replaces it as a whole, so the base becomes the
# default of the class, 10000. All frequencies but the first are wrong.
#
# Installs both packages in a temporary folder. Exits with 1 if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import AutoConfig, Qwen2Config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def base(config):
    """The base after the file was written, YaRN added, and the file read again."""
    Path("model").mkdir(exist_ok=True)
    Path("model/config.json").write_text(json.dumps({**config, "rope_scaling": YARN}))
    return AutoConfig.from_pretrained("model").rope_parameters["rope_theta"]


Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}).save_pretrained("saved")
saved = json.loads(Path("saved/config.json").read_text())
old = {name: value for name, value in saved.items() if name != "rope_parameters"} | {"rope_theta": 1000000.0}
print("written by transformers 5:", saved["rope_parameters"], "-> base", base(saved))
print("as transformers 4 wrote it -> base", base(old))
sys.exit((base(saved), base(old)) != (10000.0, 1000000.0))
PYTHON
