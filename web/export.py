"""Export the pretrained models for the page: `python web/export.py` writes web/models/.

Each network becomes an ONNX file for one image at a time, with weights in half precision, and is
compared with PyTorch. models.json tells the page the rest: sizes, schedules, vocabulary.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from latent_ext.clip import UNKNOWN
from latent_ext.stable_diffusion import load
from toolbox.cats import ATTRIBUTES
from toolbox.files import UserError, user_errors
from toolbox.models import PRETRAINED, load_model

OUT = Path(__file__).parent / "models"
LIMIT = 2e-3  # of the differences from PyTorch: a quarter of a grey level
TRIALS = 4


def main() -> None:
    OUT.mkdir(exist_ok=True)
    runtime = json.loads((OUT.parent / "runtime.json").read_text())
    models = {"runtime": runtime, "cats": export_cats(), "latent-cats": export_latent_cats()}
    (OUT / "models.json").write_text(json.dumps(models, indent=1))
    print(f"wrote {OUT}: start `python -m http.server` and open http://localhost:8000/web/")


def export_cats() -> dict:
    network, schedule, config = load_model("cats")
    if config["prediction"] != "v":
        raise UserError("cats: expected a network that outputs v, as the page knows no other")
    shape = (config["channels"], config["size"], config["size"])
    inputs = {"x_t": torch.zeros(1, *shape), "t": torch.zeros(1, dtype=torch.long)}
    return {
        "shape": shape,
        "schedule": {"name": schedule.name, "T": schedule.T},
        "networks": {"unet": export("cats", network, network, inputs, high=schedule.T)},
    }


def export_latent_cats() -> dict:
    pipeline = load(PRETRAINED / "latent-cats")
    if pipeline.prediction != "v_prediction":
        raise UserError("latent-cats: expected a U-Net that outputs v, as the page knows no other")
    encoder, unet, vae = pipeline.text_encoder, pipeline.unet, pipeline.vae
    tokenizer, T = pipeline.tokenizer, pipeline.schedule.T
    size = pipeline.size // pipeline.downsampling
    z = torch.zeros(1, vae.config["latent_channels"], size, size)
    tokens = tokenizer("")
    unet_inputs = {"x_t": z, "t": torch.zeros(1, dtype=torch.long), "context": encoder(tokens)}
    vocabulary = tokenizer.rules.get_vocab()
    return {
        "shape": z.shape[1:],
        "schedule": {"name": pipeline.schedule.name, "T": T},
        "attributes": ATTRIBUTES,
        "vocabulary": vocabulary,
        "length": tokenizer.length,
        "start": tokenizer.start,
        "end": tokenizer.end,
        "unknown": vocabulary[UNKNOWN],
        "networks": {
            "text_encoder": export("text", encoder, encoder, {"tokens": tokens}, tokenizer.size),
            "unet": export("latents", unet, unet, unet_inputs, high=T),
            "vae_decoder": export("decoder", pipeline.decode, vae, {"z": z}),
        },
    }


class Floats(nn.Module):
    """A function of tensors like `inputs`, called with float32 ones: the page has no others."""

    def __init__(self, function: Callable, weights: nn.Module, inputs: Sequence[Tensor]):
        super().__init__()
        self.function, self.weights = function, weights
        self.dtypes = [value.dtype for value in inputs]

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*(x.to(dtype) for x, dtype in zip(values, self.dtypes, strict=True)))


@torch.no_grad()
def export(
    name: str, function: Callable, weights: nn.Module, inputs: dict[str, Tensor], high: int = 0
) -> dict:
    """Write NAME.onnx and compare it with PyTorch; integer inputs are below `high`."""
    path = OUT / f"{name}.onnx"
    network = Floats(function, weights, [*inputs.values()]).eval()
    zeros = (*(torch.zeros(value.shape) for value in inputs.values()),)
    names = {"input_names": [*inputs], "output_names": ["output"]}
    onnx.save(halve(torch.onnx.export(network, zeros, dynamo=True, **names).model_proto), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def random(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape)
        return torch.randint(high, value.shape).float()

    def difference() -> float:
        values = {name: random(value) for name, value in inputs.items()}
        ours = session.run(None, {name: value.numpy() for name, value in values.items()})[0]
        return (torch.from_numpy(ours) - network(*values.values())).abs().max().item()

    torch.manual_seed(0)
    greatest = max(difference() for _ in range(TRIALS))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, within {greatest:.6f} of PyTorch")
    if greatest > LIMIT:
        raise UserError(
            f"{path}: expected at most {LIMIT} of difference to PyTorch, got {greatest}"
        )
    sines = [torch.arange(zero.numel()).sin().view_as(zero) for zero in zeros]
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "inputs": {name: value.shape for name, value in inputs.items()},
        "output": network(*sines).flatten()[:8].tolist(),  # for the page's own check
    }


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store weights in 16 bits. A Cast to 32 bits follows each; the runtime computes it once."""
    graph = model.graph
    for node in graph.node:
        del node.metadata_props[:]  # where in PyTorch's code it comes from: half a megabyte
    for weight in [*graph.initializer]:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32 and array.size > 100 and np.abs(array).max() < 65504:
            half = numpy_helper.from_array(array.astype(np.float16), weight.name + "_half")
            cast = helper.make_node("Cast", [half.name], [weight.name], to=TensorProto.FLOAT)
            graph.initializer.remove(weight)
            graph.initializer.append(half)
            graph.node.insert(0, cast)
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    with user_errors():
        main()
