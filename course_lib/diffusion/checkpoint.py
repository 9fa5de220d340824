"""Models on disk: a folder with config.json and safetensors weights, as diffusers lays it out.

Used by: notebooks/01_ddpm_training.ipynb, section "The shipped model".
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from course_lib.diffusion.unet import UNet
from course_lib.environment import sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(model: nn.Module, folder: str | Path, provenance: dict, dtype: torch.dtype = torch.float16) -> None:
    """Write a model with a `config` attribute: weights in `dtype`, config.json, and provenance.json beside them.

    provenance: how the model was made and how well it does; the SHA-256 of the weights is added.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"_class_name": type(model).__name__, **model.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    note = {**provenance, "files": {WEIGHTS: {"sha256": sha256(folder / WEIGHTS)}}}
    (folder / "provenance.json").write_text(json.dumps(note, indent=2) + "\n")


def load(folder: str | Path, device: torch.device | str = "cpu", model_class: type[nn.Module] = UNet) -> nn.Module:
    """Read a model that `save` wrote: float32, evaluation mode, channels-last.

    Raises ValueError if there is no such model, if it is of another class, or if the weights are damaged.
    """
    folder = Path(folder)
    for name in ("config.json", "provenance.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"folder: expected a model folder with {name}, but {folder} has none")
    config = json.loads((folder / "config.json").read_text())
    kind = config.pop("_class_name", None)
    if kind != model_class.__name__:
        raise ValueError(f"folder: expected a {model_class.__name__}, but {folder} holds a {kind}")
    expected = json.loads((folder / "provenance.json").read_text())["files"][WEIGHTS]["sha256"]
    if sha256(folder / WEIGHTS) != expected:
        raise ValueError(f"folder: {folder / WEIGHTS} is damaged (SHA-256 differs from provenance.json); restore it")
    model = model_class(**config)
    model.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
