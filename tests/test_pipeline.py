"""The three uses of one loop: latent by latent as diffusers, and what else they promise."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines import stable_diffusion as diffusers
from oracles import cross_unet, error, randomise

from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.guidance import ClassUNet, guided
from latent_ext.pipeline import ClassPipeline, Pipeline, image_to_image, inpaint, text_to_image
from latent_ext.stable_diffusion import save
from latent_ext.vae import VAE
from processes import NoiseSchedule, noise_from_v, randn_like
from toolbox.files import UserError
from toolbox.seeds import generators, sample_seeds

PROMPTS = ["an orange cat with green eyes", "a black dog"]
SD = {"schedule": NoiseSchedule.scaled_linear()}
TOY = {"schedule": NoiseSchedule.cosine(), "prediction": "v_prediction", "spacing": "trailing"}
NINE = dict(SD)  # with nine channels: a U-Net trained for inpainting
WHITE = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))  # not in cells of 4x4


def tiny_pipeline(in_channels=4, dtype=torch.float64, **like):
    """With random weights that fit into 16 bits, as saved ones do."""
    sizes = {"in_channels": in_channels, "out_channels": 4, "channels": (16, 32), "heads": 2}
    unet = cross_unet(16, **sizes, attention_levels=(True, False), groups=4)
    vae = VAE(channels=(8, 16, 16), groups=4, scaling_factor=0.4)
    tokenizer = Tokenizer.of_words(PROMPTS, length=10)
    text = TextEncoder(tokenizer.size, 16, 2, 2, tokenizer.length)
    networks = [randomise(network).half().to(dtype) for network in (unet, vae, text)]
    return Pipeline(*networks, tokenizer, size=32, **(SD | like))


def images(n=2, size=32, seed=0):
    """Of numbers that 32 bits hold exactly, as diffusers rounds to these somewhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 257, (n, 3, size, size), generator=generator).double() / 128 - 1


def opened_by_diffusers(folder, kind=diffusers.StableDiffusionPipeline):
    theirs = kind.from_pretrained(folder, safety_checker=None, dtype=torch.float64)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def judge(kind, pipeline, folder):
    """diffusers' pipeline, of the folder that ours writes, with our levels in double precision."""
    save(pipeline, folder)
    judge = opened_by_diffusers(folder, kind)
    alpha_bar = judge.scheduler.alphas_cumprod = pipeline.schedule.alpha_bar.double()
    if pipeline.spacing == "leading":  # else it ends at level 1
        judge.scheduler.final_alpha_cumprod = alpha_bar[0]
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
def test_every_latent_is_that_of_diffusers(draw, settings, likes, tmp_path):
    for like in likes:
        pipeline = tiny_pipeline(9 if like is NINE else 4, **like)
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
        judged = judge(kind, pipeline, tmp_path)(**options, **given).images
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
    with pytest.raises(UserError, match="--steps 1000: expected 1 to 999"):
        pipeline.timesteps(1000)


@torch.no_grad()
def test_strength_0_keeps_the_image_and_1_forgets_it():
    pipeline, x = tiny_pipeline(), images()

    def redraw(x, **settings):
        return image_to_image(pipeline, PROMPTS, x, generator=generators(SEEDS), **settings)

    decoded = pipeline.decode(pipeline.encode(x, generators(SEEDS)))
    assert torch.equal(redraw(x, strength=0), decoded)
    assert torch.equal(redraw(x, strength=0.1, steps=9), decoded)  # not one step
    other = images(seed=1)
    assert torch.equal(redraw(x, strength=1, steps=3), redraw(other, strength=1, steps=3))


def test_a_predict_noise_of_ones_own_takes_the_place_of_the_pipelines():
    pipeline = tiny_pipeline()

    def swapped(z_t, t, context):
        return pipeline.predict_noise(z_t, t, context.flip(0))

    def draw(prompts, **options):
        options |= {"steps": 3, "guidance_scale": 1, "generator": generators(SEEDS)}
        return text_to_image(pipeline, prompts, **options)

    assert torch.equal(draw(PROMPTS), draw(PROMPTS[::-1], predict_noise=swapped))


@pytest.mark.parametrize("draw", GIVEN)
def test_networks_of_16_bits_are_sampled_in_32_and_leave_no_graph(draw):
    given, dtypes, drawn = [x.float() for x in GIVEN[draw]], set(), []
    options = {"steps": 3, "guidance_scale": 2, "eta": 1}
    options["on_step"] = lambda z, t_prev, x0: dtypes.add(z.dtype) or z
    for dtype in (torch.float16, torch.float32):
        pipeline, drawn_from = tiny_pipeline(dtype=dtype), generators(SEEDS)
        drawn.append(draw(pipeline, PROMPTS, *given, generator=drawn_from, **options))
        z, t = torch.zeros(2, 4, 8, 8), torch.tensor([5, 900])
        noise = pipeline.predict_noise(z, t, pipeline.encode_prompts(PROMPTS))
        dtypes.add(noise.dtype)  # guidance, too, is computed in 32
    torch.testing.assert_close(*drawn, atol=0.05, rtol=0)
    assert dtypes == {torch.float32} and not drawn[0].requires_grad


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
