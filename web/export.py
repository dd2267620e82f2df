"""Export the ready models for the page: `python web/export.py` writes web/models/.

Each network becomes an ONNX file for one image at a time, with weights in half precision, and is
compared with PyTorch. models.json tells the page the rest: sizes, schedules, vocabulary.
"""

import json
import sys
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
    models = {"cats": export_cats(), "latent-cats": export_latent_cats()}
    (OUT / "models.json").write_text(json.dumps(models, indent=1))
    print(f"wrote {OUT}: start `python -m http.server` and open http://localhost:8000/web/")


def export_cats() -> dict:
    network, schedule, config = load_model("cats")
    shape = (config["channels"], config["size"], config["size"])
    inputs = {"x_t": torch.zeros(1, *shape), "t": torch.zeros(1, dtype=torch.long)}
    return {
        "shape": shape,
        "schedule": {"name": schedule.name, "T": schedule.T},
        "prediction": config["prediction"],
        "networks": {"unet": export("cats", network, inputs, high=schedule.T)},
    }


def export_latent_cats() -> dict:
    pipeline = load(PRETRAINED / "latent-cats")
    tokenizer = pipeline.tokenizer
    vocabulary = tokenizer.rules.get_vocab()
    size = pipeline.size // pipeline.vae.downsampling
    z = torch.zeros(1, pipeline.vae.config["latent_channels"], size, size)
    t = torch.zeros(1, dtype=torch.long)
    tokens = tokenizer("")
    context = torch.zeros_like(pipeline.text_encoder(tokens))
    decoder = Call(pipeline.decode, pipeline.vae)
    encoder, unet = pipeline.text_encoder, pipeline.unet
    return {
        "shape": z.shape[1:],
        "size": pipeline.size,
        "schedule": {"name": pipeline.schedule.name, "T": pipeline.schedule.T},
        "prediction": "v",
        "attributes": ATTRIBUTES,
        "vocabulary": vocabulary,
        "length": tokenizer.length,
        "start": tokenizer.start,
        "end": tokenizer.end,
        "unknown": vocabulary[UNKNOWN],
        "networks": {
            "text_encoder": export("text_encoder", encoder, {"tokens": tokens}, len(vocabulary)),
            "unet": export("unet", unet, {"x_t": z, "t": t, "context": context}, pipeline.schedule.T),
            "vae_decoder": export("vae_decoder", decoder, {"z": z}),
        },
    }


class Call(nn.Module):
    """A function, as the module that torch.onnx.export expects; `module` has its weights."""

    def __init__(self, function, module: nn.Module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def export(name: str, network: nn.Module, inputs: dict[str, Tensor], high: int = 0) -> dict:
    """Write NAME.onnx and compare it with PyTorch; high: integers are random ones below it."""
    path = OUT / f"{name}.onnx"
    network.eval().requires_grad_(False)
    program = torch.onnx.export(
        network, (*inputs.values(),), input_names=[*inputs], output_names=["output"], dynamo=True
    )
    onnx.save(halve(program.model_proto), path)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def difference(values: list[Tensor]) -> float:
        theirs = network(*values)
        ours = session.run(None, {k: v.numpy() for k, v in zip(inputs, values, strict=True)})[0]
        return np.abs(ours - theirs.numpy()).max().item()

    def random(value: Tensor) -> Tensor:
        return torch.randn_like(value) if value.is_floating_point() else torch.randint_like(value, high)

    torch.manual_seed(0)
    greatest = max(difference([*map(random, inputs.values())]) for _ in range(TRIALS))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, within {greatest:.6f} of PyTorch")
    if greatest > LIMIT:
        raise UserError(f"{path}: expected at most {LIMIT} of difference from PyTorch, got {greatest}")
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "inputs": {
            name: {"type": str(value.dtype).removeprefix("torch."), "shape": value.shape}
            for name, value in inputs.items()
        },
        "output": network(*map(example, inputs.values())).flatten()[:8].tolist(),
    }


def example(value: Tensor) -> Tensor:
    """The input with which the page compares its network: sin(0), sin(1), ...; integers are 1."""
    if not value.is_floating_point():
        return torch.ones_like(value)
    return torch.arange(value.numel()).sin().view_as(value)


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
