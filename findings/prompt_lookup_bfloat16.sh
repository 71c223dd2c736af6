#!/usr/bin/env bash
# transformers 5.23.0 with PyTorch 2.13.0: in bfloat16 on a CPU, prompt_lookup_num_tokens changes the model's own greedy text.
#
# Expected: prompt lookup is a way to generate the same greedy text in fewer passes.
# Seen: in float32 all of 20 texts are the same. In bfloat16 some are not, although a second plain run gives the same text again. A pass over
# several tokens rounds its sums otherwise than passes over one, and the nearest two logits then change places. The model is small and random,
# its seed is fixed; a trained model does the same (seen with SmolLM2-135M-Instruct).
#
# Installs both packages in a temporary folder. Exits with 1 if the behaviour changes. How many texts differ depends on the processor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

TEXTS, HALF, NEW = 20, 24, 48
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
shape = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.06,
)  # fmt: skip


def text(model, prompt, **lookup):
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0, **lookup)
    with torch.inference_mode():
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0, prompt.shape[1] :].tolist()


differ = {}
for kind in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape).to(kind).eval()
    differ[kind] = 0
    for seed in range(TEXTS):
        half = torch.randint(3, 512, (1, HALF), generator=torch.Generator().manual_seed(seed))
        prompt = torch.cat([half, half], 1)  # it repeats itself, so prompt lookup drafts from it
        plain, again = text(model, prompt), text(model, prompt)
        looked = text(model, prompt, prompt_lookup_num_tokens=10)
        if plain != again:
            sys.exit(f"{kind}: two plain runs differ")
        if looked != plain:
            at = next((i for i, (a, b) in enumerate(zip(plain, looked)) if a != b), min(len(plain), len(looked)))
            if not differ[kind]:
                print(f"{kind}, prompt {seed}, new token {at + 1}: plain {plain[at : at + 3]}, prompt lookup {looked[at : at + 3]}")
            differ[kind] += 1
    print(f"{kind}: {differ[kind]} of {TEXTS} texts differ")
sys.exit(differ[torch.float32] != 0 or differ[torch.bfloat16] == 0)
PYTHON
