// The live page: the loop of sampler.js with the ready models, in ONNX Runtime Web.

import * as s from "./sampler.js";

const LOCAL = "node_modules/onnxruntime-web/dist/"; // of `npm install` in this folder
const CDN = (version) => `https://cdn.jsdelivr.net/npm/onnxruntime-web@${version}/dist/`;
const $ = (selector, root = document) => root.querySelector(selector);
const say = (text) => ($("#status").textContent = text);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const { forms } = document;

// ---- The models ----------------------------------------------------------------------------

const progress = { loaded: 0, total: 0 };
/** Bytes that have arrived, and bytes that are expected. */
function count(loaded, total = 0) {
  progress.loaded += loaded;
  progress.total += total;
  const [bar, megabytes] = [$("progress"), (bytes) => (bytes / 1e6).toFixed(1)];
  [bar.max, bar.value, bar.hidden] = [progress.total, progress.loaded, false];
  say(`Loading: ${megabytes(progress.loaded)} of ${megabytes(progress.total)} MB`);
}

async function get(url) {
  const response = await fetch(url);
  if (!response.ok) throw Error(`${url} is missing: run python web/export.py, then reload.`);
  return response;
}

async function download({ file }) {
  const [reader, chunks] = [(await get(`models/${file}`)).body.getReader(), []];
  for (let chunk; !(chunk = await reader.read()).done; count(chunk.value.length))
    chunks.push(chunk.value);
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

/** ONNX Runtime Web from the first source that has it; its hashes are checked. */
async function loadRuntime(kind) {
  const { version, [kind]: files } = await (await get("runtime.json")).json();
  const load = async ({ file, bytes, integrity }) => {
    count(0, bytes);
    for (const source of location.protocol === "https:" ? [CDN(version)] : [LOCAL, CDN(version)]) {
      const response = await fetch(source + file, { integrity }).catch(() => ({ ok: false }));
      if (response.ok) return response.blob().finally(() => count(bytes));
    }
    throw Error(`${file} is missing: connect to the internet, or run npm install in web/.`);
  };
  const [code, binary] = await Promise.all(files.map(load));
  const ort = await import(URL.createObjectURL(code.slice(0, code.size, "text/javascript")));
  ort.env.wasm.numThreads = 1; // more would need headers that static hosting does not send
  ort.env.wasm.wasmBinary = await binary.arrayBuffer();
  return ort;
}

let running = Promise.resolve(); // the runtime allows one network call at a time

/** An ONNX file as a function of arrays, after a check that it computes what PyTorch does. */
async function makeNetwork(ort, kind, bytes, { file, inputs, output }) {
  const session = await ort.InferenceSession.create(bytes, { executionProviders: [kind] });
  const tensor = ({ type, shape }, x) =>
    new ort.Tensor(type, type === "int64" ? BigInt64Array.from(x, BigInt) : x, shape);
  const network = (...values) => {
    const feeds = Object.entries(inputs).map(([name, like], i) => [name, tensor(like, values[i])]);
    const call = async () => (await session.run(Object.fromEntries(feeds))).output.data;
    return (running = running.catch(() => {}).then(call));
  };
  const example = ({ type, shape }) => {
    const length = shape.reduce((a, b) => a * b);
    return Float32Array.from({ length }, (_, i) => (type === "int64" ? 1 : Math.sin(i)));
  };
  const answer = await network(...Object.values(inputs).map(example));
  if (!output.every((expected, i) => Math.abs(expected - answer[i]) < 0.02))
    throw Error(`${file} computes wrong numbers on this device (${kind}).`);
  return network;
}

/** What models.json says of a model, with its schedule, its networks and its predictNoise. */
async function loadModel(config, runtime, kind) {
  const model = { ...config, schedule: s.NoiseSchedule.named(config.schedule.name, config.schedule.T) };
  const [names, files] = [Object.keys(config.networks), Object.values(config.networks)];
  count(0, sum(files.map(({ bytes }) => bytes)));
  const bytes = await Promise.all(files.map(download));
  for (const [i, name] of names.entries())
    model[name] = await makeNetwork(await runtime, kind, bytes[i], files[i]);
  model.network = (x_t, t, ...context) => model.unet(x_t, [t], ...context);
  const wrap = { v: s.noiseFromV, velocity: s.noiseFromVelocity, noise: (network) => network };
  model.predictNoise = wrap[config.prediction](model.network, model.schedule);
  model.size = config.shape.reduce((a, b) => a * b);
  $("progress").hidden = true;
  say(`Ready. The network runs on ${kind === "wasm" ? "one core of your CPU" : "your GPU"}.`);
  return model;
}

/** The first model, and loadLatent() for the second one, on the GPU if that works. */
async function loadAll() {
  if (!globalThis.WebAssembly)
    throw Error("This browser cannot run the network: it has no WebAssembly, or has it off.");
  const configs = await (await get("models/models.json")).json();
  for (const form of [forms.ask, forms.edit]) makeSentence(form, configs["latent-cats"].attributes);
  const gpu = location.search !== "?wasm" && (await navigator.gpu?.requestAdapter().catch(() => 0));
  for (const kind of gpu ? ["webgpu", "wasm"] : ["wasm"])
    try {
      const runtime = loadRuntime(kind);
      const model = await loadModel(configs.cats, runtime, kind);
      let latent;
      return { model, loadLatent: () => (latent ??= loadModel(configs["latent-cats"], runtime, kind)) };
    } catch (error) {
      if (kind === "wasm") throw error;
    }
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
  constructor(section, rows, columns, onShow = () => {}) {
    Object.assign(this, { rows, onShow, frames: Array.from({ length: columns }, () => []) });
    const root = $(`${section} .player`);
    const canvases = (size) => `<canvas width="${size}" height="${size}"></canvas>`.repeat(columns);
    const line = ({ label, size }) => `<div><span>${label}</span>${canvases(size)}</div>`;
    root.innerHTML = `<div class="rows">${rows.map(line).join("")}</div>
      <div class="controls"><button type="button">Play</button>
      <input type="range" value="0" max="0" aria-label="Step" /><output></output></div>`;
    this.canvases = [...$(".rows", root).children].map((row) => row.querySelectorAll("canvas"));
    [this.button, this.slider, this.text] = ["button", "input", "output"].map((tag) => $(tag, root));
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

  /** A new frame of a column; shown is every one, or every fourth. */
  async add(frame, column, every = 1) {
    const k = this.frames[column].push(frame) - 1;
    if (k % every === 0 || frame.t === -1) await this.show(k, [column]);
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
    const { slider } = this;
    if (slider.value === slider.max) slider.value = -1;
    this.playing = !this.playing;
    while (this.playing && Number(slider.value) < slider.max) {
      await this.show(Number(slider.value) + 1);
      await new Promise((resolve) => setTimeout(resolve, 60));
    }
    this.playing = false;
    await this.show(Number(slider.value));
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

/** The values of a form by their names. */
function read(form) {
  const value = (input) =>
    input.type === "checkbox" ? input.checked
      : /number|range/.test(input.type) ? Number(input.value)
        : input.value;
  return Object.fromEntries([...form.elements].map((input) => [input.name, value(input)]));
}

let current = 0;
/** Do `work`, which stops at `proceed()` when newer work has begun; say what went wrong. */
async function run(work) {
  const [mine, stopped] = [++current, Error("stopped")];
  const proceed = async () => {
    await new Promise((resolve) => setTimeout(resolve)); // let the browser draw and take clicks
    if (mine !== current) throw stopped;
  };
  await work(proceed).catch((error) => {
    if (error === stopped) return;
    say(error.message);
    $("progress").hidden = true;
    console.error(error);
  });
}

// ---- 1. Draw -------------------------------------------------------------------------------

const models = loadAll();
const CATS = 4;
const cats = new Player(
  "#draw",
  [
    { label: "x<sub>t</sub>: what the network sees", size: 32, image: (f) => rgb(f.x_t, 32) },
    { label: "noise: what it predicts", size: 32, image: (f) => faint(rgb(f.noise, 32)) },
    { label: "x0: the clean image it believes in", size: 32, image: (f) => rgb(f.x0, 32) },
  ],
  CATS,
  (k) => {
    const frame = cats.frames[0][k];
    if (frame) $(".equation").innerHTML = equation(frame, cats.schedule, cats.settings.eta);
  },
);

/** Four cats, one after the other, so that the first one is there early; with or without bugs. */
async function drawCats(player, settings, bugs, proceed) {
  const { model } = await models;
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
    await record(predictNoise, generator.randn(model.size), schedule, options, async (frame) => {
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
  "#break",
  [
    { label: "right", size: 32, image: (_, i, k) => rgb(cats.frames[i][k].x_t, 32) },
    { label: "broken", size: 32, image: (f) => rgb(f.x_t, 32) },
  ],
  CATS,
);

async function drawBroken(proceed) {
  const { settings } = cats;
  if (cats.frames[CATS - 1].length <= settings.steps) await drawCats(cats, settings, {}, proceed);
  await drawCats(broken, settings, read(forms.break), proceed);
  const [right, wrong] = [cats, broken].map((player) =>
    player.frames.flatMap((frames) => [...frames.at(-1).x0]),
  );
  const difference = Math.sqrt(sum(right.map((x0, i) => (x0 - wrong[i]) ** 2)) / right.length);
  $("#break .result").textContent =
    `Difference between right and broken: ${difference.toFixed(3)} ` +
    "(root mean square; pixels range from −1 to 1).";
}

forms.break.onchange = () => run(drawBroken);

// ---- 3. Ask --------------------------------------------------------------------------------

const LATENT_ROWS = [
  { label: "x<sub>t</sub>: four channels of latents", size: 32, image: (f) => latents(f.x_t) },
  { label: "x0: the latents it believes in", size: 32, image: (f) => latents(f.x0) },
  { label: "x0, decoded", size: 64, image: async (f) => rgb((f.image ??= await f.decode()), 64) },
];
const asked = new Player("#ask", LATENT_ROWS, 1);
const edited = new Player("#edit", LATENT_ROWS, 1);

function makeSentence(form, { fur, pattern, eyes, background }) {
  const select = (name, words) =>
    `<select name="${name}" aria-label="${name}">` +
    `${words.map((word) => `<option>${word}</option>`).join("")}</select>`;
  $(".sentence", form).innerHTML =
    `a ${select("fur", fur)} ${select("pattern", pattern)} cat ` +
    `with ${select("eyes", [...eyes, "any"])} eyes ` +
    `on a ${select("background", [...background, "any"])} background`;
}

/** The sentence as the captions of the training data have it. */
function prompt(form) {
  const { fur, pattern, eyes, background } = read(form);
  const words = [/^[aeiou]/.test(fur) ? "an" : "a", fur];
  if (pattern !== "plain") words.push(pattern);
  words.push("cat");
  if (eyes !== "any") words.push(`with ${eyes} eyes`);
  if (background !== "any") words.push(`on a ${background} background`);
  return words.join(" ");
}

/** Words -> numbers, START ... END, filled up with END: the Tokenizer of latent_ext/clip.py. */
function tokenize(text, { vocabulary, length, start, end, unknown }) {
  const words = text.toLowerCase().match(/[\p{L}\p{N}_]+|[^\p{L}\p{N}_\s]+/gu) ?? [];
  const missing = words.filter((word) => !(word in vocabulary));
  if (missing.length) say(`This model does not know: ${missing.join(", ")}`);
  const tokens = words.slice(0, length - 2).map((word) => vocabulary[word] ?? unknown);
  return [start, ...tokens, ...Array(length - 1 - tokens.length).fill(end)];
}

/** text_to_image of latent_ext/pipeline.py; image_to_image with a start, inpaint with a mask. */
async function drawText(player, text, proceed, start, strength = 1, mask = null) {
  const model = await (await models).loadLatent();
  const { guidance, negative, steps, seed } = read(forms.ask);
  const context = await model.text_encoder(tokenize(text, model));
  const nullContext = await model.text_encoder(tokenize(negative, model));
  const predictNoise = s.guided(model.predictNoise, context, nullContext, guidance);
  const generator = new s.Generator(seed);
  const noise = generator.randn(model.size);
  const pairs = s.timestepPairs(model.schedule.T, steps);
  const timesteps = pairs.slice(steps - Math.trunc(steps * strength));
  const noised = (t) => (t === -1 ? start.z : s.addNoise(start.z, t, model.schedule, noise));
  const inside = (i, scale) =>
    !mask || mask[(Math.floor(i / (16 * scale ** 2)) % 16) * 16 + (Math.floor(i / scale) % 16)];
  const onStep = (z, t_prev) => {
    const outside = mask && noised(t_prev);
    return z.map((z, i) => (inside(i, 1) ? z : outside[i]));
  };
  const decode = async (z) =>
    (await model.vae_decoder(z)).map((pixel, i) => (inside(i, 4) ? pixel : start.image[i]));
  player.begin(timesteps.length);
  const x = strength === 1 ? noise : noised(timesteps[0]?.[0] ?? -1);
  const options = { timesteps, generator, onStep };
  const z = await record(predictNoise, x, model.schedule, options, async (frame) => {
    await proceed();
    await player.add({ ...frame, decode: () => decode(frame.x0) }, 0, 4);
  });
  return { z, image: player.frames[0].at(-1).image };
}

forms.ask.onsubmit = () =>
  run(async (proceed) => {
    const text = prompt(forms.ask);
    $("#ask .result").textContent = `“${text}”`;
    setStart(await drawText(asked, text, proceed));
  });

// ---- 4. Edit -------------------------------------------------------------------------------

const canvas = $("figure canvas");
const mask = new Uint8Array(16 * 16); // a number of the latents covers 4x4 pixels
let brush = [8, 8]; // row, column
let start, result; // {z, image}

function setStart(drawn) {
  start = drawn;
  forms.edit.redraw.disabled = false;
  mask.fill(0);
  showStart();
}

function showStart() {
  if (start) put(canvas, rgb(start.image, 64));
  const context = canvas.getContext("2d");
  context.fillStyle = "rgb(255 255 255 / 65%)";
  mask.forEach((painted, i) => painted && context.fillRect((i % 16) * 4, (i >> 4) * 4, 4, 4));
  if (document.activeElement === canvas) context.strokeRect(brush[1] * 4 - 4, brush[0] * 4 - 4, 12, 12);
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
forms.edit.clear.onclick = () => showStart(mask.fill(0));
forms.edit.keep.onclick = () => setStart(result);
forms.edit.onsubmit = () =>
  run(async (proceed) => {
    const { strength } = read(forms.edit);
    const area = mask.includes(1) ? mask.slice() : null;
    result = await drawText(edited, prompt(forms.edit), proceed, start, strength, area);
    forms.edit.keep.disabled = false;
  });

// ---- All forms -----------------------------------------------------------------------------

for (const input of document.querySelectorAll("form input[type=range]")) {
  const output = input.parentNode.appendChild(document.createElement("output"));
  input.oninput = () => (output.textContent = input.value);
  input.oninput();
}
document.onsubmit = (event) => event.preventDefault();
forms.draw.requestSubmit();
