"""The judges of the second evening: the same networks by diffusers and transformers, given the
weights of ours."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from latent_ext.weight_names import DIFFUSERS, layer_names, name_pairs

V15_UNET = {  # Stable Diffusion v1.5's numbers
    "in_channels": 4,
    "out_channels": 4,
    "channels": (320, 640, 1280, 1280),
    "num_res_blocks": 2,
    "attention_levels": (True, True, True, False),
    "heads": 8,
    "groups": 32,
}
V15_VAE = {
    "channels": (128, 256, 512, 512),
    "num_res_blocks": 2,
    "groups": 32,
    "scaling_factor": 0.18215,
}
V15_TEXT = {"vocab_size": 49408, "width": 768, "layers": 12, "heads": 12, "length": 77}


def their_unet(config, context_width):
    cross = ["CrossAttn" * attends for attends in config["attention_levels"]]
    return UNet2DConditionModel(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=config["channels"],
        layers_per_block=config["num_res_blocks"],
        down_block_types=[f"{kind}DownBlock2D" for kind in cross],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(cross)],
        cross_attention_dim=context_width,
        attention_head_dim=config["heads"],  # diffusers' name for the number of heads
        norm_num_groups=config["groups"],
    )


def their_vae(config):
    levels = len(config["channels"])
    return AutoencoderKL(
        in_channels=config["in_channels"],
        out_channels=config["in_channels"],
        latent_channels=config["latent_channels"],
        block_out_channels=config["channels"],
        layers_per_block=config["num_res_blocks"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=config["groups"],
    )


def their_text_config(config):
    return CLIPTextConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["width"],
        intermediate_size=config["hidden"],
        num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"],
        max_position_embeddings=config["length"],
        projection_dim=config["width"],
        bos_token_id=config["vocab_size"] - 2,
        eos_token_id=config["vocab_size"] - 1,
        hidden_act="quick_gelu",
        attn_implementation="sdpa",
    )


def randomise(network, seed=0):
    """Random numbers everywhere: norms at their initial 1 and 0 would hide a swapped pair."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim < 2:
                parameter.mul_(0.2).add_(0.5)
            else:
                parameter.div_(parameter[0].numel() ** 0.5)
    return network


def same_weights(part, ours, theirs, prefix=""):
    """Random ones. Theirs get copies, or ours themselves if theirs have none (meta)."""
    weights, empty = randomise(ours).state_dict(), next(theirs.parameters()).is_meta
    weights = {
        prefix + name: weights[own] if empty else weights[own].clone()
        for name, own in name_pairs(part, ours, DIFFUSERS)
    }
    theirs.load_state_dict(weights, assign=True)
    return ours, theirs.eval()


def unet_pair(ours):
    """Ours with random weights, and diffusers' with the same ones."""
    context_width = ours.mid[0].attn.attn2.k.in_features
    return same_weights("unet", ours, their_unet(ours.config, context_width))


def vae_pair(ours):
    return same_weights("vae", ours, their_vae(ours.config))


def text_pair(ours):
    theirs = CLIPTextModel(their_text_config(ours.config))
    # transformers 4 has all of this model in a `text_model`, transformers 5 has not
    prefix = "text_model." if hasattr(theirs, "text_model") else ""
    return same_weights("text_encoder", ours, theirs, prefix)


def their_text_name(name):
    """layers.0.norm1.bias -> encoder.layers.0.layer_norm1.bias, of either encoder of CLIP."""
    return renamed(name, layer_names("text_encoder", {"layers": 12}, DIFFUSERS))


def renamed(name, rules):
    """name.weight -> rules[name].weight; a name without a rule stays."""
    stem, dot, last = name.rpartition(".")
    return rules.get(stem, stem) + dot + last


def error(got, expected):
    """The largest difference, in units of the largest number."""
    return ((got - expected).abs().max() / expected.abs().max()).item()
