"""web/: the sampler in JavaScript against processes.py, and the page in a real browser."""

import base64
import hashlib
import importlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, pixels
from PIL import Image

import latent_ext.pipeline
import processes
from latent_ext.guidance import guided
from latent_ext.pipeline import inpaint, text_to_image
from latent_ext.stable_diffusion import load
from processes import NoiseSchedule
from toolbox.data import to_uint8
from toolbox.models import PRETRAINED, load_model, predict_noise_of

WEB = ROOT / "web"
RUNTIME = WEB / "node_modules/onnxruntime-web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")


def node(script: str, **values: object) -> object:
    """What an ES module prints as JSON; `values` are global constants of it, sampler.js is `s`."""
    script = f"""import fs from "node:fs";
        import * as s from "./sampler.js";
        const {{ {", ".join(values)} }} = JSON.parse(fs.readFileSync(0, "utf8"));
        const print = (result) => console.log(JSON.stringify(result));
        {script}"""
    return json.loads(
        program("node", "--input-type=module", "-e", script, input=json.dumps(values))
    )


def program(*words, **options):
    """What a program prints."""
    result = subprocess.run(words, cwd=WEB, capture_output=True, text=True, timeout=600, **options)
    assert not result.returncode, result.stderr
    return result.stdout


@needs_node
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "flow"])
@pytest.mark.parametrize("T", [1000, 7])
def test_schedules_are_those_of_processes(name, T):
    ours = node("print([...s.NoiseSchedule[name](T).alphaBar])", name=name, T=T)
    theirs = getattr(NoiseSchedule, name)(T).alpha_bar.tolist()
    assert ours == pytest.approx(theirs, rel=1e-5)


@needs_node
def test_timestep_pairs_are_those_of_processes():
    ours = node("print([...Array(1000).keys()].map((i) => s.timestepPairs(1000, i + 1)))")
    assert ours == [[[*p] for p in processes.timestep_pairs(1000, n)] for n in range(1, 1001)]


def network(x_t, t, context):
    """Any function will do: this one has no symmetry that could hide a mistake."""
    return torch.tanh(0.7 * x_t + t.to(x_t).view(-1, 1, 1, 1) / 1000 + context) + 0.3 * context


@needs_node
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    ("output", "clip_x0", "skip"), [("v", True, 0), ("noise", False, 5), ("v", False, 2)]
)
def test_sample_equals_processes_at_every_step(eta, guidance, output, clip_x0, skip):
    """In float64: near pure noise x0 is a difference of nearly equal numbers, divided by 1e-4."""
    schedule, generator = NoiseSchedule.cosine(), torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    pairs = processes.timestep_pairs(schedule.T, 12)[skip:]
    generator.manual_seed(0)
    fresh = torch.stack([processes.randn_like(x0, generator) for _ in pairs])
    predict_noise = processes.noise_from_v(network, schedule) if output == "v" else network
    contexts = [torch.full((1, 1, 1, 1), context).double() for context in (0.4, -0.5)]
    predict_noise = guided(predict_noise, *contexts, guidance)
    x, _ = processes.add_noise(x0, torch.tensor([pairs[0][0]]), schedule, noise)
    steps, options = [], {"eta": eta, "timesteps": pairs, "clip_x0": clip_x0}
    options["on_step"] = lambda x, t_prev, x0: steps.append((t_prev, x, x0)) or 0.9 * x
    processes.sample(predict_noise, x, schedule, generator=generator.manual_seed(0), **options)

    script = """const network = (x_t, t, context) =>
            x_t.map((x) => Math.tanh(0.7 * x + t / 1000 + context) + 0.3 * context);
        const schedule = s.NoiseSchedule.cosine(), steps = [];
        const wrapped = output === "v" ? s.noiseFromV(network, schedule) : network;
        const onStep = (x, t_prev, x0) => {
            steps.push([t_prev, [...x], [...x0]]);
            return x.map((x) => 0.9 * x);
        };
        const generator = { normal: () => fresh.shift() };
        const options = { eta, timesteps: pairs, clipX0, generator, onStep };
        const x = s.addNoise(Float64Array.from(x0), pairs[0][0], schedule, noise);
        await s.sample(s.guided(wrapped, 0.4, -0.5, guidance), x, schedule, options);
        print(steps);"""
    numbers = {"x0": x0, "noise": noise, "fresh": fresh}
    numbers = {name: number.flatten().tolist() for name, number in numbers.items()}
    choices = {"eta": eta, "guidance": guidance, "output": output, "clipX0": clip_x0}
    ours = node(script, **numbers, **choices, pairs=pairs)
    for (t_prev, *mine), (expected, *theirs) in zip(ours, steps, strict=True):
        assert t_prev == expected
        theirs = torch.cat(theirs).flatten(1)  # x and x0
        torch.testing.assert_close(torch.tensor(mine).double(), theirs, atol=1e-6, rtol=0)


@needs_node
def test_what_cannot_be_meant_is_refused():
    script = """const schedule = s.NoiseSchedule.cosine(), x = new Float32Array(3), messages = [];
        const wrong = [0, 1001, 2.5].map((steps) => ({ steps }));
        wrong.push({ eta: 1.1 }, { timesteps: [[5, 5]] }, { timesteps: [[1000, 5]] });
        for (const options of wrong)
            await s.sample((x) => x, x, schedule, options).catch((e) => messages.push(e.message));
        print(messages);"""
    messages = node(script)
    assert len(messages) == 6 and all("expected" in message for message in messages)


@needs_node
def test_generator_draws_independent_standard_normal_numbers():
    draw = "print([0, 1, 2, 3].map((seed) => [...new s.Generator(seed).randn(50000)]))"
    x = torch.tensor(node(draw))
    assert torch.equal(x, torch.tensor(node(draw)))  # of its seed alone
    assert x.mean(dim=1).abs().max() < 5 / 50_000**0.5
    assert (torch.cov(x) - torch.eye(4)).abs().max() < 0.02  # other seeds, other numbers
    assert (x[:, 1:] * x[:, :-1]).mean().abs() < 0.01
    share = torch.tensor([(x.abs() < bound).float().mean() for bound in (0.5, 1, 2, 3)])
    assert torch.allclose(share, torch.tensor([0.3829, 0.6827, 0.9545, 0.9973]), atol=0.005)


# ---- the page in a browser -----------------------------------------------------------------------


@pytest.mark.skipif(not RUNTIME.exists(), reason="needs `npm install` in web/")
def test_pinned_runtime_is_the_installed_one():
    pinned = json.loads((WEB / "runtime.json").read_text())
    wanted = json.loads((WEB / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    installed = json.loads((RUNTIME / "package.json").read_text())["version"]
    assert pinned.pop("version") == wanted == installed
    for file in (file for files in pinned.values() for file in files):
        content = (RUNTIME / "dist" / file["file"]).read_bytes()
        digest = base64.b64encode(hashlib.sha384(content).digest()).decode()
        assert (file["bytes"], file["integrity"]) == (len(content), f"sha384-{digest}")


@pytest.fixture(scope="module")
def exported():
    """What `python web/export.py` prints."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason="needs pip install -r web/requirements.txt")
    return program(sys.executable, "export.py")


@pytest.mark.slow
def test_exports_equal_pytorch(exported):
    differences = [float(line.split()[-3]) for line in exported.splitlines() if "within" in line]
    assert len(differences) == 4 and max(differences) < 1e-4
    sizes = {path.name: path.stat().st_size / 1e6 for path in WEB.glob("models/*.onnx")}
    assert len(sizes) == 4 and sum(sizes.values()) < 26


@pytest.mark.slow
def test_export_refuses_a_wrong_network(exported, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(WEB)
    export = importlib.import_module("export")
    monkeypatch.setattr(export, "OUT", tmp_path)
    weights = torch.nn.Linear(200, 3)
    weights.weight.data[0] = weights.bias.data[0] = 1e4 + 1  # of which 16 bits keep 10,000
    with pytest.raises(export.UserError, match="PyTorch"):
        export.export("wrong", weights, weights, {"x": torch.zeros(2, 200)})


class Page:
    """The page in a browser, with what it complains of and the addresses that it asks for."""

    def __init__(self, browser):
        self.page = browser.new_page()
        self.errors, self.requests = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, address, status="Ready"):
        """Wait until the page's status contains this."""
        self.page.goto(address)
        self.wait(f"document.querySelector('#status').textContent.includes('{status}')")

    def wait(self, condition):
        self.page.wait_for_function(condition, timeout=120_000)

    def idle(self):
        self.wait("document.body.ariaBusy === 'false'")

    def click(self, button):
        self.page.click(button)
        self.idle()

    def set(self, form, **values):
        for name, value in values.items():
            self.page.locator(f"[name={form}] [name={name}]").fill(str(value))

    def scrub(self, player, k):
        self.page.locator(f"#{player} .player-controls input").fill(str(k))
        self.page.wait_for_timeout(200)

    def row(self, player, row):
        return self.images(f"#{player} .rows > div:nth-child({row})")

    def images(self, selector):
        """The canvases, (B, 3, size, size), 0 .. 255."""
        to_urls = "(all) => all.map((canvas) => canvas.toDataURL())"
        urls = self.page.eval_on_selector_all(f"{selector} canvas", to_urls)
        files = [io.BytesIO(base64.b64decode(url.partition(",")[2])) for url in urls]
        return torch.stack([pixels(Image.open(file)) for file in files])


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not CHROMIUM or not RUNTIME.exists():
        pytest.skip("needs Chromium, and `npm install` in web/")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(exported):
    """Of the page, served as `python -m http.server` does."""
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=ROOT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/web/"
    server.shutdown()


SEED, STEPS, ETA = 5, 12, 0.6


@pytest.fixture(scope="module")
def page(browser, address):
    """It has drawn four cats."""
    page = Page(browser)
    page.open(address)
    page.set("draw", seed=SEED, steps=STEPS, eta=ETA)
    page.click("[name=draw] button")
    return page


def off(ours, theirs):
    """The greatest difference, of 255, from images in [-1, 1]."""
    return (ours - to_uint8(theirs)).abs().max().item()


def page_noise(*shape, seed=SEED):
    """What the page draws from a seed: for its start, and for each step."""
    n = (STEPS + 1) * torch.Size(shape).numel()
    numbers = node("print([...new s.Generator(seed).randn(n)])", seed=seed, n=n)
    return torch.tensor(numbers).view(-1, *shape)


@pytest.fixture
def hand_over(monkeypatch):
    """hand_over(noise): from now on `randn_like` returns one of these after the other."""

    def hand_over(noise):
        values = iter(noise)
        for module in (processes, latent_ext.pipeline):
            monkeypatch.setattr(module, "randn_like", lambda x, generator=None: next(values)[None])

    return hand_over


@pytest.fixture
def python_cat(hand_over):
    """python_cat(): x and x0 after each step, in Python, from the page's noise."""

    def draw(seed=SEED, on_step=lambda x, t_prev, x0: x, wrap=predict_noise_of, **options):
        network, schedule, config = load_model("cats")
        x, *fresh = page_noise(3, 32, 32, seed=seed)
        hand_over(fresh)
        steps = []

        def remember(x, t_prev, x0):
            x = on_step(x, t_prev, x0)
            steps.append((x[0], x0[0]))
            return x

        options = {"eta": ETA, "steps": STEPS, "clip_x0": True, "on_step": remember} | options
        processes.sample(wrap(network, schedule, config), x[None], schedule, **options)
        return steps

    return draw


@pytest.mark.slow
def test_page_shows_what_python_draws_at_each_step(page, python_cat):
    steps, pairs = python_cat(), processes.timestep_pairs(1000, STEPS)
    x = [page_noise(3, 32, 32)[0], *(x for x, _ in steps)]
    alpha_bar = [*load_model("cats")[1].alpha_bar.tolist(), 1]
    for k in (0, 1, 6, STEPS - 1):
        page.scrub("cats", k)
        assert off(page.row("cats", 1)[0], x[k]) <= 2
        assert off(page.row("cats", 3)[0], steps[k][1]) <= 2
        shown, (t, t_prev) = page.page.inner_text("#equation"), pairs[k]
        assert f"t = {t}," in shown and ("result" if t_prev == -1 else f"x{t_prev}") in shown
        assert f"noise) / {alpha_bar[t] ** 0.5:.3g}" in shown or alpha_bar[t] < 1e-6
        assert f"{alpha_bar[t_prev] ** 0.5:.3g} x0" in shown
    page.scrub("cats", STEPS)
    first, *_, last = page.row("cats", 1)
    assert off(first, x[STEPS]) <= 2 and off(last, python_cat(SEED + 3)[-1][0]) <= 2
    assert not torch.equal(first, last)


LATE = [round(1000 * k / STEPS) for k in reversed(range(STEPS))]  # it starts at 917 of 999


def noise_at_the_end(x, t_prev, x0):
    schedule, t = load_model("cats")[1], processes.timestep_pairs(1000, STEPS)[-1][0]
    sigma = ETA * (1 - schedule.alpha_bar[t]).sqrt()
    return x + sigma * page_noise(3, 32, 32)[-1] if t_prev == -1 else x


BROKEN = {
    "clip": {"clip_x0": False},
    "last": {"on_step": noise_at_the_end},
    "late": {"timesteps": [*itertools.pairwise([*LATE, -1])]},
    "v": {"wrap": lambda network, schedule, config: network},
}


@pytest.mark.slow
@pytest.mark.parametrize("bugs", [["last"], ["late"], ["v"], ["clip", "late"], []])
def test_page_breaks_the_loop_as_it_says(page, python_cat, bugs):
    for name in BROKEN:
        page.page.set_checked(f"[name=break] [name={name}]", name in bugs)
    page.idle()
    right, broken = page.row("broken", 1), page.row("broken", 2)
    options = dict(option for bug in bugs for option in BROKEN[bug].items())
    assert off(broken[0], python_cat(**options)[-1][0]) <= 2
    assert off(right[0], python_cat()[-1][0]) <= 2
    assert torch.equal(right, broken) == (not bugs)


@pytest.mark.slow
def test_page_draws_and_paints_in_what_python_does(page, hand_over):
    words = {"fur": "orange", "pattern": "plain", "eyes": "green", "background": "any"}
    for name, word in words.items():
        page.page.select_option(f"[name=ask] [name={name}]", word)
    page.set("ask", seed=SEED, steps=STEPS, guidance=3, negative="Blue background")
    page.click("[name=ask] button")
    assert not page.page.inner_text("#strange")
    pipeline, latents = load(PRETRAINED / "latent-cats"), []
    options = {"negative": "blue background", "steps": STEPS, "guidance_scale": 3.0, "eta": 1.0}
    hand_over(page_noise(4, 16, 16))
    remember = {"on_step": lambda z, t_prev, z0: latents.append(z) or z}
    images = text_to_image(pipeline, ["an orange cat with green eyes"], **options | remember)
    page.scrub("asked", STEPS)
    assert off(page.row("asked", 3), images) <= 2
    assert off(page.images("figure"), images) <= 2

    page.page.focus("figure canvas")  # by keyboard: the brush starts in the middle
    for key in ("ArrowLeft", "ArrowLeft", "ArrowDown", "Space"):
        page.page.keyboard.press(key)
    box = page.page.locator("figure canvas").bounding_box()
    page.page.mouse.move(box["x"] + box["width"] * 12.5 / 16, box["y"] + box["width"] * 4.5 / 16)
    page.page.mouse.down()  # by pointer
    page.page.mouse.up()
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:44, 20:32] = mask[..., 12:24, 44:56] = 1

    page.page.select_option("[name=ask] [name=fur]", "black")
    page.set("ask", strength=0.75)
    page.click("[name=redraw]")
    shown, prompts = page.row("asked", 3), ["a black cat with green eyes"]
    pipeline.encode = lambda images, generator: latents[-1]
    hand_over(page_noise(4, 16, 16))
    assert off(shown, inpaint(pipeline, prompts, images, mask, strength=0.75, **options)) <= 2
    changed = (shown - to_uint8(images)).abs().amax(dim=1, keepdim=True) > 2
    assert changed.any() and not (changed & (mask == 0)).any()

    page.click("[name=clear]")  # without paint and with strength 0 the start remains
    page.set("ask", strength=0)
    page.click("[name=redraw]")
    assert off(page.row("asked", 3), images) <= 2

    page.set("ask", negative="a dog, blue", steps=1)
    page.click("[name=ask] button")
    assert page.page.inner_text("#strange") == "It does not know: dog, ,."


@pytest.mark.slow
def test_page_plays_and_pauses(page):
    page.scrub("cats", STEPS)
    step = page.page.locator("#cats output")
    for _ in range(2):
        page.page.click("#cats .player-controls button")
        page.page.wait_for_timeout(300)
    paused = step.inner_text()
    assert paused not in (f"step {STEPS} of {STEPS}", f"step 0 of {STEPS}")
    page.page.wait_for_timeout(300)
    assert step.inner_text() == paused


@pytest.mark.slow
def test_page_has_no_errors_asks_nobody_else_and_fits(page, address):
    assert not page.errors
    ours = address.removesuffix("web/")
    assert all(url.startswith((ours, "blob:" + ours, "data:")) for url in page.requests)
    for width in (390, 1100):
        page.page.set_viewport_size({"width": width, "height": 800})
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width


def runtime(route, added=b""):
    """The file of the runtime that is asked for, from any address."""
    content = (RUNTIME / "dist" / route.request.url.split("/")[-1]).read_bytes()
    route.fulfill(body=content + added, headers={"access-control-allow-origin": "*"})


def other_network(route):
    models = json.loads((WEB / "models/models.json").read_text())
    models["cats"]["networks"]["unet"]["output"][3] += 0.1
    route.fulfill(body=json.dumps(models))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({"**/models.json": lambda route: route.fulfill(status=404)}, "run python web/export.py"),
        ({"**/cats.onnx": lambda route: route.abort()}, "cats.onnx is missing"),
        ({"**/dist/**": lambda route: route.abort()}, "npm install"),
        ({"**/dist/**": lambda route: runtime(route, b"\n")}, "npm install"),
        ({"**/models.json": other_network}, "computes wrong numbers"),
        ({}, "This browser cannot run the network"),  # without WebAssembly
        (
            {
                "**/node_modules/**": lambda route: route.abort(),
                "https://cdn.jsdelivr.net/**": lambda route: runtime(route),
            },
            "Ready",
        ),
    ],
)
def test_page_says_what_is_wrong(browser, address, answers, sentence):
    page = Page(browser)
    for glob, answer in answers.items():
        page.page.route(glob, answer)
    if not answers:
        page.page.add_init_script("delete globalThis.WebAssembly")
    page.open(address, sentence)
    page.idle()
    assert sentence in page.page.inner_text("#status")  # it stays there
    page.page.close()
