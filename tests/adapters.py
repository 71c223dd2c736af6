"""Makes random LoRA adapters in the form of PEFT, and folders with an adapter merged into the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

TRANSPOSED = ("c_attn", "c_proj", "c_fc")  # GPT-2 stores these as [in, out]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(
    folder: Path,
    base: Path,
    *,
    whole: tuple[str, ...] = (),
    rank: int = 4,
    alpha: float = 8,
    size: float = 1.0,
    seed: int = 0,
    modules: tuple[str, ...] = MODULES,
    **config: Any,
) -> Path:
    """An adapter of every matrix of `base` whose name ends like one of `modules`; `whole`: modules that are replaced."""
    dice = np.random.default_rng(seed)

    def rand(*shape: int) -> Any:
        return dice.standard_normal(shape, np.float32)

    tensors = {}
    for name, weight in (pair for file in sorted(base.glob("*.safetensors")) for pair in load_file(file).items()):
        module = name.removesuffix(".weight")
        if whole and module.endswith(whole):
            tensors[f"base_model.model.{name}"] = weight + rand(*weight.shape) * np.float32(0.1)
        elif weight.ndim == 2 and module.endswith(modules):
            outs, ins = weight.T.shape if module.endswith(TRANSPOSED) else weight.shape
            own = next((r for key, r in config.get("rank_pattern", {}).items() if key in module), rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = rand(own, ins) / np.float32(ins**0.5)
            tensors[f"base_model.model.{module}.lora_B.weight"] = rand(outs, own) * np.float32(size / own**0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(raw | config))
    return folder


def merged(folder: Path, base: Path, adapter: Path) -> Path:
    """`base` with the adapter added to its weights, in float64."""
    shutil.copytree(base, folder)
    config, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for name, a in tensors.items():
        if "lora" not in name:
            weights[name.removeprefix("base_model.model.")] = a
        if "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = next((r for key, r in config.get("rank_pattern", {}).items() if key in module), config["r"])
        alpha = next((r for key, r in config.get("alpha_pattern", {}).items() if key in module), config["lora_alpha"])
        factor = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        added = tensors[name.replace("lora_A", "lora_B")].astype(np.float64) @ a.astype(np.float64)
        added = factor * (added.T if module.endswith(TRANSPOSED) else added)
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + added
    save_file({name: np.ascontiguousarray(weight) for name, weight in weights.items()}, folder / "model.safetensors")
    return folder
