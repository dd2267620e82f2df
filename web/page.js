// The live page: the loop of sampler.js with the pretrained models, in ONNX Runtime Web.

import * as s from "./sampler.js";

const $ = (selector, root = document) => root.querySelector(selector);
const say = (text) => ($("#status").textContent = text);
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const { forms } = document;

// ---- The models ----------------------------------------------------------------------------

const NPM = "node_modules/onnxruntime-web/dist/"; // of `npm install` in this folder
const CDN = "https://cdn.jsdelivr.net/npm/onnxruntime-web@VERSION/dist/";
const [runtimes, models] = [{}, {}]; // promises, by name
const progress = { loaded: 0, total: 0, failed: false };
let json; // models.json

/** Bytes that have arrived, and bytes that are expected. */
function count(loaded, total) {
  progress.loaded += loaded;
  progress.total += total;
  if (progress.failed) return;
  const [bar, megabytes] = [$("progress"), (bytes) => (bytes / 1e6).toFixed(1)];
  [bar.max, bar.value, bar.hidden] = [progress.total, progress.loaded, false];
  say(`Loading: ${megabytes(progress.loaded)} of ${megabytes(progress.total)} MB`);
}

/** A file from the first of the folders that has it, counted as it arrives. */
async function download({ file, bytes, integrity }, folders, otherwise) {
  count(0, bytes);
  for (const folder of folders) {
    const response = await fetch(folder + file, { integrity }).catch(() => ({ ok: false }));
    if (!response.ok) continue;
    const transform = (chunk, controller) => {
      count(chunk.length, 0);
      controller.enqueue(chunk);
    };
    const counted = response.body.pipeThrough(new TransformStream({ transform }));
    return new Response(counted).arrayBuffer();
  }
  throw Error(`${file} is missing: ${otherwise}`);
}

/** ONNX Runtime Web, if it has the hashes of runtime.json. */
async function loadRuntime(kind) {
  const { version, [kind]: files } = json.runtime;
  const cdn = CDN.replace("VERSION", version);
  const folders = location.protocol === "https:" ? [cdn] : [NPM, cdn];
  const load = (file) => download(file, folders, "go online, or run npm install in web/.");
  const [code, binary] = await Promise.all(files.map(load));
  const ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // more would need headers that static hosting does not send
  ort.env.wasm.wasmBinary = binary;
  return ort;
}

let running = Promise.resolve(); // the runtime allows one network call at a time

/** An ONNX file as a function of arrays, after a check that it computes what PyTorch does. */
async function makeNetwork(ort, kind, bytes, { file, inputs, output }) {
  const session = await ort.InferenceSession.create(bytes, { executionProviders: [kind] });
  const shapes = Object.entries(inputs);
  const network = (...values) => {
    const tensor = (value, shape) => new ort.Tensor("float32", Float32Array.from(value), shape);
    const feeds = shapes.map(([name, shape], i) => [name, tensor(values[i], shape)]);
    const call = async () => (await session.run(Object.fromEntries(feeds))).output.data;
    return (running = running.catch(() => {}).then(call));
  };
  const sines = ([, shape]) => Array.from({ length: product(shape) }, (_, i) => Math.sin(i));
  const answer = await network(...shapes.map(sines));
  if (!output.every((expected, i) => Math.abs(expected - answer[i]) < 0.02))
    throw Error(`${file} computes wrong numbers on this device (${kind}).`);
  return network;
}

/** What models.json says of a model, with its schedule, its networks and its predictNoise. */
async function loadModel(name, kind) {
  const model = { ...json[name] };
  runtimes[kind] ??= loadRuntime(kind);
  const files = Object.values(model.networks);
  const load = (file) => download(file, ["models/"], "run python web/export.py, then reload.");
  const [ort, ...bytes] = await Promise.all([runtimes[kind], ...files.map(load)]);
  for (const [i, part] of Object.keys(model.networks).entries())
    model[part] = await makeNetwork(ort, kind, bytes[i], files[i]);
  model.schedule = s.NoiseSchedule[model.schedule.name](model.schedule.T);
  model.network = (x_t, t, ...context) => model.unet(x_t, [t], ...context);
  model.predictNoise = s.noiseFromV(model.network, model.schedule);
  $("progress").hidden = true;
  say(`Ready. The network runs on ${kind === "wasm" ? "one core of your CPU" : "your GPU"}.`);
  return model;
}

/** A model by its name: loaded once, on the GPU if that works. */
const load = (name) => (models[name] ??= tryAll(name));

async function tryAll(name) {
  if (!globalThis.WebAssembly)
    throw Error("This browser cannot run the network: it has no WebAssembly, or it is turned off.");
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  const onCPU = () => loadModel(name, "wasm");
  return gpu ? loadModel(name, "webgpu").catch(onCPU) : onCPU();
}

// ---- What is shown -------------------------------------------------------------------------

/** at(channel, row, column), in [-1, 1], onto a canvas. */
function put(canvas, at) {
  const size = canvas.width;
  const pixels = new ImageData(size, size);
  pixels.data.fill(255);
  for (let i = 0; i < size * size; i++)
    for (let channel = 0; channel < 3; channel++)
      pixels.data[4 * i + channel] = (at(channel, Math.floor(i / size), i % size) + 1) * 127.5;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}
const rgb = (x, size) => (channel, row, column) => x[(channel * size + row) * size + column];
const faint = (at) => (...place) => at(...place) / 2.5; // noise is rarely larger than 2.5
const latents = (z) => // four channels of 16x16, one in each quarter
  faint((_, row, column) => rgb(z, 16)(2 * (row >> 4) + (column >> 4), row % 16, column % 16));

/** Rows of canvases with a column for each image; play and scrub through the steps. */
class Player {
  constructor(root, rows, columns, onShow = () => {}) {
    Object.assign(this, { rows, onShow, frames: Array.from({ length: columns }, () => []) });
    const canvases = (size) => `<canvas width="${size}" height="${size}"></canvas>`.repeat(columns);
    const line = ({ label, size }) => `<div><span>${label}</span>${canvases(size)}</div>`;
    root.innerHTML = `<div class="rows">${rows.map(line).join("")}</div>
      <div class="player-controls"><button type="button">Play</button>
      <input type="range" value="0" max="0" aria-label="Step" /><output></output></div>`;
    this.canvases = [...$(".rows", root).children].map((row) => row.querySelectorAll("canvas"));
    const parts = ["button", "input", "output"].map((tag) => $(tag, root));
    [this.button, this.slider, this.text] = parts;
    this.button.onclick = () => this.play();
    this.slider.oninput = () => {
      this.playing = false;
      this.show(this.slider.valueAsNumber);
    };
  }

  begin(steps) {
    for (const frames of this.frames) frames.length = 0;
    [this.playing, this.slider.max] = [false, steps];
  }

  /** A new frame of a column, shown at once. */
  add(frame, column) {
    return this.show(this.frames[column].push(frame) - 1, [column]);
  }

  async show(k, columns = this.frames.keys()) {
    [this.slider.value, this.latest] = [k, k];
    this.text.textContent = `step ${k} of ${this.slider.max}`;
    this.button.textContent = this.playing ? "Pause" : "Play";
    for (const column of columns)
      for (const [i, row] of this.rows.entries()) {
        const frame = this.frames[column][k];
        const at = frame && (await row.image(frame, column, k));
        if (this.latest !== k) return; // meanwhile another one was asked for
        if (at) put(this.canvases[i][column], at);
      }
    this.onShow(k);
  }

  async play() {
    this.playing = !this.playing;
    const end = Number(this.slider.max);
    let k = this.slider.valueAsNumber % end; // from the end back to the beginning
    for (; this.playing && k <= end; k++) {
      await this.show(k);
      await pause(60);
    }
    this.playing = false;
    await this.show(this.slider.valueAsNumber);
  }
}

/** sample, with a frame for each step: {x_t, t, noise, t_prev, x0}; the last one is the result. */
async function record(predictNoise, x, schedule, options, onFrame) {
  let frame;
  const watched = async (x_t, t) => {
    frame = { x_t, t, noise: await predictNoise(x_t, t) };
    return frame.noise;
  };
  const onStep = async (x, t_prev, x0) => {
    await onFrame({ ...frame, t_prev, x0 });
    return options.onStep ? options.onStep(x, t_prev, x0) : x;
  };
  const x0 = await s.sample(watched, x, schedule, { ...options, onStep });
  await onFrame({ x_t: x0, t: -1, noise: x0.map(() => 0), x0 });
  return x0;
}

/** The loop's lines, equations (8) to (10) of docs/math.md, with the numbers of one step. */
function equation({ t, t_prev }, { alphaBar }, eta) {
  if (t === -1) return "Done: this x0 is the image.";
  const [ab, ab_prev] = [alphaBar[t], alphaBar[t_prev] ?? 1];
  const sigma = s.sigmaOf(ab, ab_prev, eta);
  const n = (x) => `<b>${Number(x.toPrecision(3))}</b>`;
  const prev = t_prev === -1 ? "result" : `x<sub>${t_prev}</sub>`;
  return `t = ${t}, alpha_bar = ${n(ab)}<br />
    x0 = (x<sub>${t}</sub> − ${n(Math.sqrt(1 - ab))} noise) / ${n(Math.sqrt(ab))} <i>(8)</i><br />
    clip x0 to [−1, 1]; solve (8) for the noise<br />
    ${prev} = ${n(Math.sqrt(ab_prev))} x0 + ${n(Math.sqrt(1 - ab_prev - sigma ** 2))} noise
    + ${n(sigma)} z <i>(9, 10)</i>`;
}

/** The values of a form by their names; of the switches only those that are on. */
const read = (form) =>
  Object.fromEntries(
    [...new FormData(form)].map(([name, x]) => [name, x === "" || isNaN(x) ? x : Number(x)]),
  );

let current = 0;
/** Do `work`, which stops at `proceed()` when newer work has begun; say what went wrong. */
async function run(work) {
  const [mine, stopped] = [++current, Error("stopped")];
  const proceed = async () => {
    await pause(0); // let the browser draw and take clicks
    if (mine !== current) throw stopped;
  };
  document.body.ariaBusy = true;
  try {
    await work(proceed);
  } catch (error) {
    if (error === stopped) return;
    progress.failed = true;
    say(error.message);
    console.error(error);
  } finally {
    if (mine === current) document.body.ariaBusy = false;
  }
}

// ---- 1. Draw -------------------------------------------------------------------------------

const CATS = 4;
const cats = new Player(
  $("#cats"),
  [
    { label: "x<sub>t</sub>: what the network sees", size: 32, image: (f) => rgb(f.x_t, 32) },
    { label: "noise: what it predicts", size: 32, image: (f) => faint(rgb(f.noise, 32)) },
    { label: "x0: the clean image it believes in", size: 32, image: (f) => rgb(f.x0, 32) },
  ],
  CATS,
  (k) => {
    const frame = cats.frames[0][k];
    if (frame) $("#equation").innerHTML = equation(frame, cats.schedule, cats.settings.eta);
  },
);

/** Four cats, one after the other, so that the first one is there early; with or without bugs. */
async function drawCats(player, settings, bugs, proceed) {
  const model = await load("cats");
  const { schedule } = model;
  const { seed, steps, eta } = Object.assign(player, { settings, schedule }).settings;
  let timesteps = s.timestepPairs(schedule.T, steps);
  const sigma = eta * Math.sqrt(1 - schedule.alphaBar[timesteps.at(-1)[0]]);
  if (bugs.late) {
    const late = [...timesteps.map(([, t_prev]) => t_prev + 1), -1]; // 975, 950, ..., 25, 0, -1
    timesteps = timesteps.map((_, k) => [late[k], late[k + 1]]);
  }
  player.begin(steps);
  for (let column = 0; column < CATS; column++) {
    const generator = new s.Generator(seed + column);
    const onStep = (x, t_prev) =>
      bugs.last && t_prev === -1 ? x.map((x) => x + sigma * generator.normal()) : x;
    const options = { eta, timesteps, clipX0: !bugs.clip, generator, onStep };
    const predictNoise = bugs.v ? model.network : model.predictNoise;
    const x = generator.randn(product(model.shape));
    await record(predictNoise, x, schedule, options, async (frame) => {
      await proceed();
      await player.add(frame, column);
    });
  }
}

forms.draw.onsubmit = () =>
  run(async (proceed) => {
    await drawCats(cats, read(forms.draw), {}, proceed);
    await drawBroken(proceed);
  });

// ---- 2. Break it ---------------------------------------------------------------------------

const broken = new Player(
  $("#broken"),
  [
    { label: "right", size: 32, image: (_, i, k) => rgb(cats.frames[i][k].x_t, 32) },
    { label: "broken", size: 32, image: (f) => rgb(f.x_t, 32) },
  ],
  CATS,
);

async function drawBroken(proceed) {
  const { settings = read(forms.draw) } = cats;
  if (cats.frames[CATS - 1].length <= settings.steps) await drawCats(cats, settings, {}, proceed);
  await drawCats(broken, settings, read(forms.break), proceed);
}

forms.break.onchange = () => run(drawBroken);

// ---- 3. Ask --------------------------------------------------------------------------------

const asked = new Player(
  $("#asked"),
  [
    { label: "x<sub>t</sub>: four channels of latents", size: 32, image: (f) => latents(f.x_t) },
    { label: "x0: the latents it believes in", size: 32, image: (f) => latents(f.x0) },
    { label: "x0, decoded", size: 64, image: async (f) => rgb((f.image ??= await f.decode()), 64) },
  ],
  1,
);

function makeSentence({ fur, pattern, eyes, background }) {
  const select = (name, words) => {
    const options = words.map((word) => `<option>${word}</option>`).join("");
    return `<select name="${name}" aria-label="${name}">${options}</select>`;
  };
  $("#sentence").innerHTML = `a ${select("fur", fur)} ${select("pattern", pattern)} cat
    with ${select("eyes", [...eyes, "any"])} eyes
    on a ${select("background", [...background, "any"])} background`;
}

/** The sentence as the captions of the training data have it. */
function prompt({ fur, pattern, eyes, background }) {
  const article = /^[aeiou]/.test(fur) ? "an" : "a";
  return `${article} ${fur} ${pattern} cat with ${eyes} eyes on a ${background} background`
    .replace(" plain", "")
    .replace(" with any eyes", "")
    .replace(" on a any background", "");
}

/** Words -> numbers, START ... END, filled up with END: the Tokenizer of latent_ext/clip.py. */
function tokenize(text, { vocabulary, length, start, end, unknown }) {
  const words = text.toLowerCase().match(/[\p{L}\p{N}_]+|[^\p{L}\p{N}_\s]+/gu) ?? [];
  const strange = words.filter((word) => !(word in vocabulary));
  $("#strange").textContent = strange.length ? `It does not know: ${strange.join(", ")}.` : "";
  const tokens = words.slice(0, length - 2).map((word) => vocabulary[word] ?? unknown);
  return [start, ...tokens, ...Array(length - 1 - tokens.length).fill(end)];
}

/** text_to_image of latent_ext/pipeline.py; image_to_image with a start, inpaint with a mask. */
async function drawText(proceed, start, strength, mask) {
  const model = await load("latent-cats");
  const { guidance, negative, steps, seed, ...words } = read(forms.ask);
  const context = await model.text_encoder(tokenize(prompt(words), model));
  const nullContext = await model.text_encoder(tokenize(`${negative}`, model));
  const predictNoise = s.guided(model.predictNoise, context, nullContext, guidance);
  const generator = new s.Generator(seed);
  const noise = generator.randn(product(model.shape));
  const pairs = s.timestepPairs(model.schedule.T, steps);
  const timesteps = pairs.slice(steps - Math.trunc(steps * strength));
  const noised = (t) => (t === -1 ? start.z : s.addNoise(start.z, t, model.schedule, noise));
  const inside = (i, scale) => // is this number of (4, 16, 16), or of (3, 64, 64), in the mask?
    mask[(Math.floor(i / (16 * scale ** 2)) % 16) * 16 + (Math.floor(i / scale) % 16)];
  const onStep = (z, t_prev) => {
    const outside = start && noised(t_prev);
    return z.map((z, i) => (inside(i, 1) ? z : outside[i]));
  };
  const decode = async (z) =>
    (await model.vae_decoder(z)).map((pixel, i) => (inside(i, 4) ? pixel : start.image[i]));
  asked.begin(timesteps.length);
  const x = strength === 1 ? noise : noised(timesteps[0]?.[0] ?? -1);
  const options = { timesteps, generator, onStep };
  const z = await record(predictNoise, x, model.schedule, options, async (frame) => {
    await proceed();
    await asked.add({ ...frame, decode: () => decode(frame.x0) }, 0);
  });
  return { z, image: asked.frames[0].at(-1).image };
}

// ---- 4. Edit -------------------------------------------------------------------------------

const ALL = new Uint8Array(16 * 16).fill(1); // a mask of the latents: each covers 4x4 pixels
const mask = new Uint8Array(16 * 16);
const canvas = $("figure canvas");
let brush = [8, 8]; // row, column
let start, result; // {z, image}

function showStart() {
  forms.ask.redraw.disabled = !start;
  if (start) put(canvas, rgb(start.image, 64));
  const context = canvas.getContext("2d");
  context.fillStyle = "rgb(255 255 255 / 65%)";
  mask.forEach((painted, i) => painted && context.fillRect((i % 16) * 4, (i >> 4) * 4, 4, 4));
  const [y, x] = brush.map((place) => place * 4 - 4);
  if (document.activeElement === canvas) context.strokeRect(x, y, 12, 12);
}

function paint() {
  for (let i = 0; i < mask.length; i++)
    if (Math.hypot((i >> 4) - brush[0], (i % 16) - brush[1]) < 1.5) mask[i] = 1;
  showStart();
}

canvas.onpointerdown = canvas.onpointermove = ({ buttons, offsetX, offsetY }) => {
  if (!buttons) return;
  brush = [offsetY, offsetX].map((offset) => Math.floor((16 * offset) / canvas.clientWidth));
  paint();
};
canvas.onkeydown = (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (!move && event.key !== " ") return;
  event.preventDefault();
  if (!move) return paint();
  brush = brush.map((place, i) => Math.min(Math.max(place + move[i], 0), 15));
  showStart();
};
canvas.onfocus = canvas.onblur = showStart;

function setStart(drawn) {
  start = drawn;
  mask.fill(0);
  showStart();
}
forms.ask.clear.onclick = () => setStart(start);
forms.ask.keep.onclick = () => setStart(result ?? start);
forms.ask.onsubmit = ({ submitter }) =>
  run(async (proceed) => {
    const { strength } = read(forms.ask);
    const area = mask.includes(1) ? mask.slice() : ALL;
    if (submitter.name === "redraw") result = await drawText(proceed, start, strength, area);
    else setStart((result = await drawText(proceed, null, 1, ALL)));
  });

// ---- Start ---------------------------------------------------------------------------------

for (const input of document.querySelectorAll("label input[type=range]")) {
  const output = input.parentNode.appendChild(document.createElement("output"));
  input.oninput = () => (output.textContent = input.value);
  input.oninput();
}
document.onsubmit = (event) => event.preventDefault();
run(async () => {
  const response = await fetch("models/models.json");
  if (!response.ok) throw Error("The models are missing: run python web/export.py, then reload.");
  json = await response.json();
  makeSentence(json["latent-cats"].attributes);
  forms.draw.requestSubmit();
});
