"""The three uses of one loop: latent by latent as diffusers, and what else they promise."""

import copy
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines import stable_diffusion as diffusers
from oracles import error, randomise, text_pair, unet_pair, vae_pair
from transformers import PreTrainedTokenizerFast

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import END, START, UNKNOWN, TextEncoder, Tokenizer
from latent_ext.guidance import ClassUNet, guided
from latent_ext.pipeline import ClassPipeline, Pipeline, image_to_image, inpaint, text_to_image
from latent_ext.vae import VAE
from processes import NoiseSchedule, noise_from_v, randn_like
from toolbox.files import UserError
from toolbox.seeds import generators, sample_seeds
from unet import UNet

PROMPTS = ["an orange cat with green eyes", "a black dog"]
SD = {"schedule": NoiseSchedule.scaled_linear()}
TOY = {"schedule": NoiseSchedule.cosine(), "prediction": "v_prediction", "spacing": "trailing"}
NINE = dict(SD)  # with nine channels: a U-Net trained for inpainting
WHITE = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))  # not in cells of 4x4


def networks(in_channels=4):
    """Each of ours with random weights, and diffusers' or transformers' with the same ones."""
    attention = partial(SpatialTransformer, context_width=16)
    unet = UNet(in_channels, 4, (16, 32), 1, (True, False), 2, 4, attention)
    tokenizer = Tokenizer.of_words(PROMPTS, length=10)
    text = TextEncoder(tokenizer.size, 16, 2, 2, tokenizer.length)
    vae = VAE(channels=(8, 16, 16), groups=4, scaling_factor=0.4)
    pairs = unet_pair(unet.double()), vae_pair(vae.double()), text_pair(text.double())
    return *zip(*pairs, strict=True), tokenizer


def tiny_pipeline(in_channels=4, dtype=torch.float64, **like):
    ours, _, tokenizer = networks(in_channels)
    ours = [network.to(dtype) for network in ours]
    return Pipeline(*ours, tokenizer, size=32, **(SD | like))


def images(n=2, size=32, seed=0):
    """Of numbers that 32 bits hold exactly, as diffusers rounds to these somewhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 257, (n, 3, size, size), generator=generator).double() / 128 - 1


def judge(kind, pipeline, theirs):
    """diffusers' pipeline, with their networks."""
    leading, alpha_bar = pipeline.spacing == "leading", pipeline.schedule.alpha_bar.double()
    options = {"timestep_spacing": pipeline.spacing, "prediction_type": pipeline.prediction}
    scheduler = DDIMScheduler(**options, steps_offset=int(leading), clip_sample=False)
    scheduler.alphas_cumprod = alpha_bar
    scheduler.final_alpha_cumprod = alpha_bar[0] if leading else torch.ones((), dtype=torch.float64)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}
    rules, length = copy.deepcopy(pipeline.tokenizer.rules), pipeline.tokenizer.length
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=length, **special)
    theirs[0].register_to_config(sample_size=8)
    theirs[1].register_to_config(scaling_factor=0.4)
    networks = dict(zip(("unet", "vae", "text_encoder"), theirs, strict=True))
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    judge = kind(**networks, tokenizer=tokenizer, scheduler=scheduler, **without)
    judge.set_progress_bar_config(disable=True)
    return judge


SEEDS, SIZE, IMAGE = [0, 1], {"height": 32, "width": 32}, {"image": images() / 2 + 0.5}
KINDS = {
    text_to_image: (diffusers.StableDiffusionPipeline, SIZE),
    image_to_image: (diffusers.StableDiffusionImg2ImgPipeline, IMAGE),
    inpaint: (diffusers.StableDiffusionInpaintPipeline, SIZE | IMAGE | {"mask_image": WHITE}),
}
GIVEN = {text_to_image: (), image_to_image: (images(),), inpaint: (images(), WHITE)}


@pytest.mark.parametrize(
    ("draw", "settings", "likes"),
    [
        (text_to_image, {"guidance_scale": 1}, [SD, TOY]),
        (text_to_image, {"guidance_scale": 7.5}, [SD, TOY]),
        (text_to_image, {"guidance_scale": 3, "negative": "green dog"}, [SD, TOY]),
        (text_to_image, {"guidance_scale": 3, "negative": "a cat", "eta": 1}, [SD, TOY]),
        (image_to_image, {"guidance_scale": 3, "strength": 0.2}, [SD, TOY]),
        (image_to_image, {"guidance_scale": 3, "strength": 0.75, "eta": 1}, [SD, TOY]),
        (inpaint, {"guidance_scale": 1, "strength": 0.6}, [SD, TOY]),
        (inpaint, {"guidance_scale": 3, "strength": 1.0}, [SD, TOY, NINE]),
    ],
)
@torch.no_grad()
def test_every_latent_is_that_of_diffusers(draw, settings, likes):
    for like in likes:
        ours, theirs, tokenizer = networks(9 if like is NINE else 4)
        pipeline = Pipeline(*ours, tokenizer, size=32, **like)
        kind, given = KINDS[draw]
        if like is NINE:  # diffusers draws its random numbers in another order: give it ours
            drawn = generators(SEEDS)
            z0 = pipeline.encode(images(), drawn)
            around = pipeline.encode(images() * (WHITE < 0.5), drawn)
            noise = randn_like(z0, drawn)
            given = given | {"image": z0, "masked_image_latents": around, "latents": noise}
        mine, expected = [], []
        options = {"steps": 5, "generator": generators(SEEDS)}
        options["on_step"] = lambda z, t_prev, x0, mine=mine: mine.append(z) or z
        result = draw(pipeline, PROMPTS, *GIVEN[draw], **options, **settings)
        options = {name: value for name, value in settings.items() if name != "negative"}
        options |= {"prompt": PROMPTS, "negative_prompt": [settings.get("negative", "")] * 2}
        options |= {"num_inference_steps": 5, "generator": generators(SEEDS), "output_type": "pt"}
        options["callback_on_step_end"] = lambda _, i, t, x, z=expected: z.append(x["latents"]) or x
        judged = judge(kind, pipeline, theirs)(**options, **given).images
        assert len(mine) == len(expected) > 0
        assert all(error(z, judged_z) < 1e-9 for z, judged_z in zip(mine, expected, strict=True))
        white = (WHITE if draw is inpaint else torch.ones_like(WHITE)).expand_as(judged) >= 0.5
        torch.testing.assert_close((result / 2 + 0.5)[white], judged[white], rtol=0, atol=1e-8)
        assert torch.equal(result[~white], images()[~white])  # diffusers leaves this to its user
        assert ((judged > 0) & (judged < 1)).double().mean() > 0.1 and judged.std() > 0.05


@pytest.mark.parametrize("steps", [1, 3, 7, 50, 999])
def test_the_time_steps_are_those_of_diffusers(steps):
    scheduler = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps.tolist()
    pipeline = Pipeline(None, None, None, None, NoiseSchedule.scaled_linear())
    assert pipeline.timesteps(steps) == list(zip(t, [*t[1:], 0], strict=True))
    assert pipeline.timesteps(steps, 0.3) == pipeline.timesteps(steps)[steps - int(0.3 * steps) :]


@pytest.mark.parametrize("like", [SD, TOY])
def test_impossible_time_steps_are_refused(like):
    pipeline = Pipeline(None, None, None, None, **like)
    wrong = [(0, 1), (1000 + (like is TOY), 1), (5, -0.1), (5, 1.1), (5, float("nan"))]
    for steps, strength in wrong:
        with pytest.raises(UserError, match="expected"):
            pipeline.timesteps(steps, strength)


def draws(pipeline, **settings):
    """The three of them, each as a function of prompts and seeds."""
    dtype = torch.promote_types(pipeline.weight.dtype, torch.float32)
    x, masks = images(3).to(dtype), WHITE[:1].expand(3, -1, -1, -1)
    given = {text_to_image: [], image_to_image: [x], inpaint: [x, masks]}

    def draw(function, tensors, prompts, seeds):
        tensors = [tensor[: len(prompts)] for tensor in tensors]
        return function(pipeline, prompts, *tensors, generator=generators(seeds), **settings)

    return [partial(draw, function, tensors) for function, tensors in given.items()]


def test_an_image_depends_on_its_own_prompt_and_seed_only():
    for draw in draws(tiny_pipeline(**TOY), steps=4, guidance_scale=2, eta=1):
        both = draw(["a black dog", "a cat"], [0, 1])
        assert not both.requires_grad  # nor was a graph kept on the way
        torch.testing.assert_close(draw(["a black dog"], [0]), both[:1], atol=1e-9, rtol=0)
        assert (draw(["orange"], [0]) - both[0]).abs().max() > 0.01
        assert (draw(["a black dog"], [9]) - both[0]).abs().max() > 0.01


def test_nothing_that_is_passed_in_is_changed():
    x, masks, kept = images(), WHITE.clone(), []
    settings = {"steps": 3, "on_step": lambda z, t_prev, x0: kept.append((z, z.clone())) or z}
    for strength in (0.0, 0.5, 1.0):
        image_to_image(tiny_pipeline(), PROMPTS, x, strength=strength, **settings)
        inpaint(tiny_pipeline(), PROMPTS, x, masks, strength=strength, **settings)
    assert torch.equal(x, images()) and torch.equal(masks, WHITE)
    assert all(torch.equal(z, then) for z, then in kept)


@torch.no_grad()
def test_strength_0_keeps_the_image_and_1_forgets_it():
    pipeline, x = tiny_pipeline(), images()

    def redraw(x, **settings):
        return image_to_image(pipeline, PROMPTS, x, generator=generators([0, 1]), **settings)

    decoded = pipeline.decode(pipeline.encode(x, generators([0, 1])))
    assert torch.equal(redraw(x, strength=0), decoded)
    assert torch.equal(redraw(x, strength=0.1, steps=9), decoded)  # not one step
    forgotten = redraw(x, strength=1, steps=3)
    assert torch.equal(forgotten, redraw(images(seed=1), strength=1, steps=3))
    for white, expected in ((1.0, forgotten), (0.0, x)):
        masks = torch.full((2, 1, 32, 32), white)
        result = inpaint(pipeline, PROMPTS, x, masks, steps=3, generator=generators([0, 1]))
        assert torch.equal(result, expected)


def test_a_predict_noise_of_ones_own_mixes_two_prompts():
    """The experiment of three lines: half of each answer is another prompt's."""
    pipeline, settings = tiny_pipeline(), {"steps": 3, "guidance_scale": 1}
    dog = pipeline.encode_prompts(PROMPTS[1:])

    def mixed(x_t, t, context):
        noise = pipeline.predict_noise(x_t, t, context)
        return (noise + pipeline.predict_noise(x_t, t, dog)) / 2

    def draw(prompt, predict_noise=None):
        options = {"predict_noise": predict_noise, "generator": generators([0])}
        return text_to_image(pipeline, [prompt], **options, **settings)

    assert torch.equal(draw(PROMPTS[1], mixed), draw(PROMPTS[1]))
    between, cat, other = draw(PROMPTS[0], mixed), draw(PROMPTS[0]), draw(PROMPTS[1])
    distance = (cat - other).abs().mean()
    assert 0 < (between - cat).abs().mean() < distance > (between - other).abs().mean() > 0


def test_networks_of_16_bits_are_sampled_in_32():
    half, single, kept = tiny_pipeline(dtype=torch.float16), tiny_pipeline(dtype=torch.float32), []
    settings = {"steps": 3, "guidance_scale": 2}
    watched = settings | {"on_step": lambda z, t_prev, x0: kept.append(z.dtype) or z}
    for draw, exact in zip(draws(half, **watched), draws(single, **settings), strict=True):
        torch.testing.assert_close(draw(PROMPTS, [0, 1]), exact(PROMPTS, [0, 1]), atol=0.05, rtol=0)
    assert set(kept) == {torch.float32}


def test_other_sizes_than_the_trained_one():
    pipeline = tiny_pipeline()
    assert text_to_image(pipeline, PROMPTS, size=48, steps=1).shape == (2, 3, 48, 48)
    assert image_to_image(pipeline, PROMPTS, images(size=16), steps=4).shape == (2, 3, 16, 16)


def test_a_class_conditional_model_of_pixels_is_guided_and_sampled_as_it_is():
    torch.manual_seed(0)
    classes = {"fur": ["black", "orange"], "eyes": ["green", "orange"]}
    network = randomise(ClassUNet(classes, 16, channels=(8, 16), attention_levels=(False, True)))
    schedule = NoiseSchedule.cosine()
    pipeline = ClassPipeline(network, schedule, {"size": 8, "prediction": "v"})
    settings, prompts = {"steps": 4, "eta": 1}, ["orange fur, green", "black"]
    guidance = {"guidance_scale": 3, "generator": generators([5, 6])}
    x = text_to_image(pipeline, prompts, **guidance, **settings)
    labels, open_ = torch.tensor([[2, 1], [1, 0]]), torch.zeros(1, 2, dtype=torch.long)
    predict_noise = guided(noise_from_v(network, schedule), labels, open_, 3)
    expected = sample_seeds(predict_noise, (3, 8, 8), [5, 6], schedule, clip_x0=True, **settings)
    torch.testing.assert_close(x, expected)
    assert torch.equal(image_to_image(pipeline, ["", ""], x, strength=0), x)
