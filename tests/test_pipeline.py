"""Text to image, image to image and inpainting: against diffusers' three pipelines, step by step, and what they promise."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from test_unet import to_their_names
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import END, START, UNKNOWN, TextEncoder, Tokenizer
from latent_ext.guidance import ClassUNet, guided
from latent_ext.pipeline import Pipeline, Pixels, image_to_image, inpaint, of_classes, text_to_image
from latent_ext.vae import VAE
from processes import NoiseSchedule, randn, sample, v_to_noise
from unet import UNet

PROMPTS = ["an orange cat with green eyes", "a black dog"]
LIKE_STABLE_DIFFUSION = {"schedule": NoiseSchedule.scaled_linear(), "prediction": "epsilon", "spacing": "leading"}
LIKE_THE_TOY = {"schedule": NoiseSchedule.cosine(), "prediction": "v_prediction", "spacing": "trailing"}


def tiny_pipeline(in_channels=4, dtype=torch.float64, **how):
    """All three networks, random in every parameter: 1-d ones at their initial 0 and 1 would hide mistakes."""
    tokenizer = Tokenizer.of_words(PROMPTS, length=10)
    unet = UNet(in_channels, 4, (16, 32), 1, (True, False), 2, 4, 16, SpatialTransformer)
    text_encoder = TextEncoder(tokenizer.size, 16, 2, 2, tokenizer.length)
    vae = VAE(widths=(8, 16, 16), groups=4, scale=0.4)
    generator = torch.Generator().manual_seed(0)
    for network in (unet, text_encoder, vae):
        for p in network.parameters():
            numbers = torch.randn(p.shape, generator=generator)
            p.data = 0.5 + 0.2 * numbers if p.ndim == 1 else numbers / p[0].numel() ** 0.5
        network.to(dtype)
    return Pipeline(unet, vae, text_encoder, tokenizer, size=32, **(LIKE_STABLE_DIFFUSION | how))


def seeds(n=2, first=0):
    return [torch.Generator().manual_seed(seed) for seed in range(first, first + n)]


def pictures(n=2, size=32, seed=0):
    """Of numbers that 32 bits hold exactly, as diffusers rounds to these somewhere."""
    numbers = torch.randint(0, 257, (n, 3, size, size), generator=torch.Generator().manual_seed(seed))
    return numbers.double() / 128 - 1


def left_half(n=2, size=32):
    masks = torch.zeros(n, 1, size, size)
    masks[..., : size // 2] = 1
    return masks


# ---- diffusers' pipelines, with the same weights ------------------------------------------------------------------------


def copied(ours, theirs, rename):
    weights = {rename(name): w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights)  # strict: none is missing, none is left over
    return theirs.double().eval()


def unet_name(name):
    name = to_their_names(name, 1, 2).replace("group_norm", "norm")
    for ours, theirs in {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v."}.items():
        name = name.replace(ours, theirs)
    name = name.replace("ff.hidden", "ff.net.0.proj").replace("ff.out", "ff.net.2")
    for attention in ("attn1", "attn2"):
        name = name.replace(f"{attention}.out.", f"{attention}.to_out.0.")
    for part in ("norm1", "norm2", "norm3", "attn1", "attn2", "ff"):
        if "attentions" in name:
            name = name.replace(f".{part}.", f".transformer_blocks.0.{part}.")
    return name


def vae_name(name):
    part, _, rest = name.partition(".")
    if part in ("quant", "post_quant"):
        return f"{part}_conv.{rest}"
    if rest.startswith("first"):
        return f"{part}.{rest.replace('first', 'conv_in')}"
    return f"{part}.{to_their_names(rest, 1, 3)}".replace("conv.1.", "conv.")


def text_name(name):
    changes = {
        "token.": "embeddings.token_embedding.",
        "position.": "embeddings.position_embedding.",
        "norm.": "final_layer_norm.",
    }
    for ours, theirs in changes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for ours, theirs in {"norm1": "layer_norm1", "norm2": "layer_norm2", "hidden": "mlp.fc1", "back": "mlp.fc2"}.items():
        name = name.replace(ours, theirs)
    for ours in ("q", "k", "v", "out"):
        name = name.replace(f".{ours}.", f".self_attn.{ours}_proj.")
    return f"encoder.{name}"


def judge(kind, pipeline):
    unet, text, alpha_bar = pipeline.unet.config, pipeline.text_encoder.config, pipeline.schedule.alpha_bar.double()
    leading = pipeline.spacing == "leading"
    scheduler = DDIMScheduler(
        timestep_spacing=pipeline.spacing,
        prediction_type=pipeline.prediction,
        steps_offset=1 if leading else 0,
        set_alpha_to_one=not leading,
        clip_sample=False,
    )
    scheduler.alphas_cumprod = alpha_bar  # equal to float32's rounding (test_processes.py); here to float64's
    scheduler.final_alpha_cumprod = alpha_bar[0] if leading else torch.tensor(1.0, dtype=torch.float64)
    theirs = kind(
        unet=copied(
            pipeline.unet,
            UNet2DConditionModel(
                sample_size=8,
                in_channels=unet["in_channels"],
                block_out_channels=unet["widths"],
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=unet["heads"],  # means the number of heads
                cross_attention_dim=unet["context_width"],
                norm_num_groups=unet["groups"],
            ),
            unet_name,
        ),
        vae=copied(
            pipeline.vae,
            AutoencoderKL(
                block_out_channels=(8, 16, 16),
                down_block_types=["DownEncoderBlock2D"] * 3,
                up_block_types=["UpDecoderBlock2D"] * 3,
                norm_num_groups=4,
                sample_size=32,
                scaling_factor=0.4,
            ),
            vae_name,
        ),
        text_encoder=copied(
            pipeline.text_encoder,
            CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=text["vocabulary"],
                    hidden_size=text["width"],
                    intermediate_size=text["hidden"],
                    num_hidden_layers=text["layers"],
                    num_attention_heads=text["heads"],
                    max_position_embeddings=text["length"],
                    hidden_act="quick_gelu",
                )
            ),
            text_name,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=copy.deepcopy(pipeline.tokenizer.rules),
            bos_token=START,
            eos_token=END,
            pad_token=END,
            unk_token=UNKNOWN,
            model_max_length=pipeline.tokenizer.length,
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs


def same_steps(draw, theirs, **given):
    """Compares the latents after each step; returns the pictures, in 0 .. 1: draw(on_step) is ours, the other is theirs."""
    mine, expected = [], []
    images = draw(lambda z, t_prev: mine.append(z) or z)
    result = theirs(
        output_type="pt",
        generator=seeds(),
        callback_on_step_end=lambda pipe, i, t, tensors: expected.append(tensors["latents"]) or tensors,
        **given,
    ).images
    assert len(mine) == len(expected) > 0
    for ours, their in zip(mine, expected, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-9, atol=1e-9 * their.abs().max().item())
    assert ((result > 0) & (result < 1)).double().mean() > 0.1 and result.std() > 0.05  # there is something to compare
    return images / 2 + 0.5, result


KINDS = pytest.mark.parametrize("like", [LIKE_STABLE_DIFFUSION, LIKE_THE_TOY], ids=["stable diffusion", "toy"])


@KINDS
@pytest.mark.parametrize(("guidance", "negative", "eta"), [(1, "", 0), (7.5, "", 0), (3, "green dog", 0), (3, "a cat", 1)])
def test_text_to_image_is_diffusers(like, guidance, negative, eta):
    pipeline = tiny_pipeline(**like)
    images, expected = same_steps(
        lambda on_step: text_to_image(
            pipeline,
            PROMPTS,
            negative=negative,
            steps=5,
            guidance=guidance,
            eta=eta,
            generator=seeds(),
            on_step=on_step,
        ),
        judge(StableDiffusionPipeline, pipeline),
        prompt=PROMPTS,
        negative_prompt=[negative] * 2,
        num_inference_steps=5,
        guidance_scale=guidance,
        eta=eta,
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-8)


@KINDS
@pytest.mark.parametrize(("strength", "eta"), [(0.2, 0), (0.75, 0), (0.75, 1)])
def test_image_to_image_is_diffusers(like, strength, eta):
    pipeline, images = tiny_pipeline(**like), pictures()
    result, expected = same_steps(
        lambda on_step: image_to_image(
            pipeline,
            PROMPTS,
            images,
            strength,
            negative="green",
            steps=5,
            guidance=3,
            eta=eta,
            generator=seeds(),
            on_step=on_step,
        ),
        judge(StableDiffusionImg2ImgPipeline, pipeline),
        prompt=PROMPTS,
        negative_prompt=["green"] * 2,
        image=images / 2 + 0.5,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=3,
        eta=eta,
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-8)


def spots(n=2, size=32):
    """Masks whose white and black do not follow the latents' cells."""
    return torch.rand(n, 1, size, size, generator=seeds(1)[0])


@KINDS
@pytest.mark.parametrize(("strength", "guidance"), [(1.0, 3), (0.6, 3), (0.6, 1)])
def test_inpainting_is_diffusers(like, strength, guidance):
    pipeline, images, masks = tiny_pipeline(**like), pictures(), spots()
    how = {"negative": "green", "steps": 5, "guidance": guidance, "generator": seeds()}
    result, expected = same_steps(
        lambda on_step: inpaint(pipeline, PROMPTS, images, masks, strength, on_step=on_step, **how),
        judge(StableDiffusionInpaintPipeline, pipeline),
        prompt=PROMPTS,
        negative_prompt=["green"] * 2,
        image=images / 2 + 0.5,
        mask_image=masks,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=guidance,
        height=32,
        width=32,
    )
    white = masks.expand_as(images) >= 0.5
    torch.testing.assert_close(result[white], expected[white], rtol=0, atol=1e-8)
    assert torch.equal(result[~white], (images / 2 + 0.5)[~white])  # diffusers leaves this to its user


def test_inpainting_with_a_network_trained_for_it_is_diffusers():
    """Nine channels: x_t, the mask, and the latents of the picture without what is repainted."""
    pipeline, images, masks, generators = tiny_pipeline(in_channels=9), pictures(), spots(), seeds()
    white = masks >= 0.5
    result, expected = same_steps(
        lambda on_step: inpaint(pipeline, PROMPTS, images, masks, steps=5, generator=seeds(), on_step=on_step),
        judge(StableDiffusionInpaintPipeline, pipeline),
        prompt=PROMPTS,
        image=pipeline.encode(images, generators).detach(),  # in the order in which we draw random numbers
        masked_image_latents=pipeline.encode(images * ~white, generators).detach(),
        latents=randn((2, 4, 8, 8), generators, torch.float64),
        mask_image=masks,
        num_inference_steps=5,
        height=32,
        width=32,
    )
    white = white.expand_as(images)
    torch.testing.assert_close(result[white], expected[white], rtol=0, atol=1e-8)
    assert torch.equal(result[~white], (images / 2 + 0.5)[~white])


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 50, 999])
def test_the_time_steps_are_those_of_diffusers(steps):
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    pipeline = tiny_pipeline()
    times = scheduler.timesteps.tolist()
    assert pipeline.walk(steps) == list(zip(times, [*times[1:], 0], strict=True))
    assert pipeline.walk(steps, 0.3) == pipeline.walk(steps)[steps - int(0.3 * steps) :]
    assert pipeline.walk(steps, 0) == []


# ---- what they promise --------------------------------------------------------------------------------------------------


def gaussian_pipeline(colours):
    """Its answer is exact for pixels that are normally distributed around the prompt's colour: a network that has learned."""
    schedule, spread = NoiseSchedule.cosine(), 0.05

    def unet(x_t, t, context):
        a = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        mean = context[:, :, None, None]
        x0 = mean + a.sqrt() * spread**2 / (a * spread**2 + 1 - a) * (x_t - a.sqrt() * mean)
        return (x_t - a.sqrt() * x0) / (1 - a).sqrt()

    unet.config = {"in_channels": 3}
    words = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, 0, 0], *colours.values()]))
    numbers = {"": 0} | {name: 1 + i for i, name in enumerate(colours)}
    return Pipeline(
        unet,
        Pixels(3),
        words,
        lambda texts: torch.tensor([numbers[text] for text in texts]),
        schedule,
        size=16,
        spacing="trailing",
    )


COLOURS = {"red": [0.8, -0.8, -0.8], "green": [-0.8, 0.8, -0.8]}


def test_the_stronger_the_further_from_the_image_and_the_closer_to_the_prompt():
    pipeline, images = gaussian_pipeline(COLOURS), pictures(2, 16).float() / 2
    way, aim = [], []
    for strength in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1):
        result = image_to_image(pipeline, ["red", "green"], images, strength, guidance=1, generator=seeds())
        way.append((result - images).square().mean().sqrt().item())
        aim.append((result - torch.tensor([*COLOURS.values()])[:, :, None, None]).square().mean().sqrt().item())
    assert way[0] == 0 and way == sorted(way) and len(set(way)) == len(way)
    assert aim == sorted(aim, reverse=True) and aim[-1] < 0.06  # the spread of the pictures that it knows


def test_a_hole_follows_the_prompt_and_all_else_is_kept():
    pipeline, images, masks = gaussian_pipeline(COLOURS), pictures(2, 16).float(), left_half(2, 16)
    result = inpaint(pipeline, ["red", "green"], images, masks, guidance=1, generator=seeds())
    assert torch.equal(result[..., 8:], images[..., 8:])
    for image, colour in zip(result, COLOURS.values(), strict=True):
        torch.testing.assert_close(image[:, :, :8].mean(dim=(1, 2)), torch.tensor(colour), atol=0.03, rtol=0)


def draws(pipeline):
    """The three of them, each as a function of prompts and generators."""
    images, masks = pictures(3).float(), left_half(3)
    how = {"steps": 4, "guidance": 2, "eta": 1}
    return [
        lambda prompts, generator: text_to_image(pipeline, prompts, generator=generator, **how),
        lambda prompts, generator: image_to_image(pipeline, prompts, images[: len(prompts)], 0.5, generator=generator, **how),
        lambda prompts, generator: inpaint(
            pipeline, prompts, images[: len(prompts)], masks[: len(prompts)], 0.5, generator=generator, **how
        ),
    ]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["text", "image", "mask"])
def test_a_picture_depends_on_its_own_prompt_and_seed_only(which):
    draw = draws(tiny_pipeline(dtype=torch.float32, **LIKE_THE_TOY))[which]
    three = draw(["a black dog", "a cat", "green eyes"], seeds(3))
    one = draw(["a black dog"], seeds(1))
    other = draw(["a black dog", "orange"], seeds(2))
    torch.testing.assert_close(three[:1], one, atol=1e-4, rtol=0)
    torch.testing.assert_close(other[:1], one, atol=1e-4, rtol=0)
    assert (other[1] - three[1]).abs().max() > 0.01  # the prompt is heard
    assert (draw(["a black dog"], seeds(1, first=9)) - one).abs().max() > 0.01  # so is the seed


def test_nothing_that_is_handed_in_is_changed():
    pipeline = tiny_pipeline(dtype=torch.float32)
    images, masks, prompts, how = pictures().float(), left_half(), list(PROMPTS), {"steps": 3, "negative": "dog"}
    before = copy.deepcopy((images, masks, prompts, how)), copy.deepcopy(pipeline.unet.state_dict())
    kept = []

    def on_step(z, t_prev):
        kept.append((z, z.clone()))
        return z

    for strength in (0.0, 0.5, 1.0):
        image_to_image(pipeline, prompts, images, strength, on_step=on_step, **how)
        inpaint(pipeline, prompts, images, masks, strength, on_step=on_step, **how)
    text_to_image(pipeline, prompts, on_step=on_step, **how)
    assert torch.equal(images, before[0][0]) and torch.equal(masks, before[0][1]) and (prompts, how) == before[0][2:]
    assert all(torch.equal(w, before[1][name]) for name, w in pipeline.unet.state_dict().items())
    assert all(torch.equal(z, then) for z, then in kept)  # nor is what the caller was handed


def test_strength_0_leaves_the_picture_and_1_forgets_it():
    pipeline, images, masks = tiny_pipeline(), pictures(), left_half()
    decoded = pipeline.decode(pipeline.encode(images, seeds())).detach()
    assert torch.equal(image_to_image(pipeline, PROMPTS, images, 0, generator=seeds()), decoded)
    assert torch.equal(image_to_image(pipeline, PROMPTS, images, 0.1, steps=9, generator=seeds()), decoded)  # not one step
    still = inpaint(pipeline, PROMPTS, images, masks, 0, generator=seeds())
    assert torch.equal(still, torch.where(masks >= 0.5, decoded, images))
    a, b = (image_to_image(pipeline, PROMPTS, pictures(seed=seed), 1, steps=3, generator=seeds()) for seed in (0, 1))
    assert torch.equal(a, b)
    c = inpaint(pipeline, PROMPTS, images, torch.ones_like(masks), steps=3, generator=seeds())
    assert torch.equal(a, c)
    d = inpaint(pipeline, PROMPTS, images, torch.zeros_like(masks), steps=3, generator=seeds())
    assert torch.equal(d, images)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_other_strengths_are_an_error(strength):
    with pytest.raises(ValueError, match="expected a strength from 0"):
        image_to_image(tiny_pipeline(), PROMPTS, pictures(), strength)


@pytest.mark.parametrize("like", [LIKE_STABLE_DIFFUSION, LIKE_THE_TOY], ids=["stable diffusion", "toy"])
@pytest.mark.parametrize("steps", [0, 1001])
def test_too_few_and_too_many_steps_are_an_error(like, steps):
    with pytest.raises(ValueError, match="expected 1 to"):
        text_to_image(tiny_pipeline(**like), PROMPTS, steps=steps)


def test_networks_of_16_bits_are_sampled_in_32():
    pipeline = tiny_pipeline(dtype=torch.float16)
    kept = []
    how = {"steps": 3, "guidance": 2, "generator": seeds(), "on_step": lambda z, t: kept.append(z.dtype) or z}
    images = inpaint(pipeline, PROMPTS, text_to_image(pipeline, PROMPTS, **how), left_half(), **how)
    assert images.dtype == torch.float32 and images.isfinite().all() and set(kept) == {torch.float32}
    exact = tiny_pipeline(dtype=torch.float32)
    how = {"steps": 3, "guidance": 2}
    a, b = (text_to_image(p, PROMPTS, generator=seeds(), **how) for p in (pipeline, exact))
    torch.testing.assert_close(a, b, atol=0.05, rtol=0)


def test_other_sizes_than_the_trained_one():
    pipeline = tiny_pipeline(dtype=torch.float32)
    assert text_to_image(pipeline, PROMPTS, size=48, steps=1).shape == (2, 3, 48, 48)
    assert image_to_image(pipeline, PROMPTS, pictures(size=16).float(), steps=4).shape == (2, 3, 16, 16)


def test_a_model_of_classes_is_a_pipeline_too():
    """Guidance between contexts, as `guided` would have it between labels; what has no name is label 0."""
    classes = {"fur": ["black", "orange"], "eyes": ["green", "orange"]}
    network = ClassUNet(classes, 16, widths=(8, 16), attention=(False, True), heads=2, groups=4).double()
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    schedule = NoiseSchedule.cosine()
    pipeline = of_classes(network, schedule, 8)
    prompts, labels = ["orange fur, green", "black"], torch.tensor([[2, 1], [1, 0]])
    ours = text_to_image(pipeline, prompts, steps=4, guidance=3, eta=1, generator=seeds())
    told = guided(v_to_noise(network, schedule), labels, torch.zeros(1, 2, dtype=torch.long), 3)
    noise_generators = seeds()
    noise = randn((2, 3, 8, 8), noise_generators, torch.float64)
    expected = sample(told, noise, schedule, steps=4, eta=1, clip=True, generator=noise_generators)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert torch.equal(image_to_image(pipeline, prompts, ours, 0), ours)
