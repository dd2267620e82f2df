// The two processes of a diffusion model: processes.py in JavaScript, the same names and order.
//
// x0 is clean data and x_t its noised version: a Float32Array of any length (one image), where
// x.map((x, i) => ...) computes value by value. t is an integer. The model is any function
// predictNoise(x_t, t) that returns the noise in x_t, or a promise of it.
// "math.md (4)" is equation 4 of docs/math.md.
// Left out, as the page has no use for them: noise_from_velocity, order 2 and snr_pairs.

/** How much data is left at each step: x_t = sqrt(alphaBar) x0 + sqrt(1 - alphaBar) noise. */
export class NoiseSchedule {
  constructor(name, alphaBar) {
    this.name = name;
    this.alphaBar = Float32Array.from(alphaBar); // float32, as in PyTorch
  }

  get T() {
    return this.alphaBar.length;
  }

  /** DDPM (Ho et al. 2020, section 4): beta of math.md (1) grows from 0.0001 to 0.02. */
  static linear(T = 1000) {
    return NoiseSchedule.fromBetas("linear", linspace(1e-4, 0.02, T));
  }

  /** Stable Diffusion (Rombach et al. 2022, its code): sqrt(beta) grows linearly. */
  static scaled_linear(T = 1000) {
    const roots = linspace(0.00085 ** 0.5, 0.012 ** 0.5, T);
    return NoiseSchedule.fromBetas("scaled_linear", roots.map((root) => root ** 2));
  }

  /** Nichol & Dhariwal 2021, eq. 17: alphaBar is a squared cosine; beta is at most 0.999. */
  static cosine(T = 1000) {
    const angle = (s) => ((s + 0.008) / 1.008) * (Math.PI / 2);
    const f = linspace(0, 1, T + 1).map((s) => Math.cos(angle(s)) ** 2);
    const betas = f.slice(1).map((next, t) => Math.min(1 - next / f[t], 0.999));
    return NoiseSchedule.fromBetas("cosine", betas);
  }

  /** Jabri et al. 2022, fig. 8: a logistic curve from 3 to -3, rescaled to run from 1 to 0. */
  static sigmoid(T = 1000) {
    const curve = linspace(3, -3, T + 1).map((s) => 1 / (1 + Math.exp(-s)));
    const rescaled = curve.map((y) => (y - curve[T]) / (curve[0] - curve[T]));
    return NoiseSchedule.fromAlphaBar("sigmoid", rescaled.slice(1));
  }

  /** Flow matching (Lipman et al. 2023): a straight line from data to noise. math.md (19) */
  static flow(T = 1000) {
    const s = linspace(0, 1, T + 1).slice(1);
    return NoiseSchedule.fromAlphaBar("flow", s.map((s) => (1 - s) ** 2 / ((1 - s) ** 2 + s ** 2)));
  }

  static fromBetas(name, betas) {
    let product = 1;
    return new NoiseSchedule(name, betas.map((beta) => (product *= 1 - beta))); // math.md (2)
  }

  static fromAlphaBar(name, alphaBar) {
    return new NoiseSchedule(name, alphaBar.map((ab) => Math.max(ab, 1e-9))); // not 0: math.md (8)
  }
}

const linspace = (start, end, n) =>
  Array.from({ length: n }, (_, i) => start + ((end - start) * i) / (n - 1));

/** The forward process in one jump (DDPM eq. 4): x_t. */
export function addNoise(x0, t, schedule, noise) {
  const ab = schedule.alphaBar[t];
  return x0.map((x0, i) => Math.sqrt(ab) * x0 + Math.sqrt(1 - ab) * noise[i]); // math.md (3)
}

/** predictNoise of a network that outputs v = sqrt(ab) noise - sqrt(1 - ab) x0, ab = alphaBar. */
export function noiseFromV(network, schedule) {
  return async (x_t, t, ...context) => {
    const ab = schedule.alphaBar[t];
    const v = await network(x_t, t, ...context);
    return x_t.map((x_t, i) => Math.sqrt(1 - ab) * x_t + Math.sqrt(ab) * v[i]); // math.md (11)
  };
}

/**
 * The reverse process (DDPM Algorithm 2; DDIM eq. 12): x, noise or x_t, becomes x0.
 *
 * timesteps replaces steps: pairs [t, t_prev], descending; t_prev = -1 means clean.
 * clipX0: the data is known to lie in [-1, 1]. generator.normal() draws the fresh noise.
 * onStep(x, t_prev, x0) returns the x to continue with; x0 is the step's estimate.
 */
export async function sample(predictNoise, x, schedule, options = {}) {
  const { steps = 40, eta = 1, timesteps, clipX0 = false, generator, onStep } = options;
  if (!(eta >= 0 && eta <= 1))
    throw RangeError(`expected an eta from 0 (DDIM, no fresh noise) to 1 (DDPM), got ${eta}`);
  const alphaBar = (t) => (t === -1 ? 1 : schedule.alphaBar[t]); // -1: clean
  for (const [t, t_prev] of timesteps ?? timestepPairs(schedule.T, steps)) {
    if (!(-1 <= t_prev && t_prev < t && t < schedule.T))
      throw RangeError(`expected ${schedule.T} > t > t_prev >= -1, got the pair ${t}, ${t_prev}`);
    const [ab, ab_prev] = [alphaBar(t), alphaBar(t_prev)];
    let noise = await predictNoise(x, t);

    let x0 = x.map((x, i) => (x - Math.sqrt(1 - ab) * noise[i]) / Math.sqrt(ab)); // math.md (8)
    if (clipX0) {
      x0 = x0.map((x0) => Math.min(Math.max(x0, -1), 1));
      noise = x.map((x, i) => (x - Math.sqrt(ab) * x0[i]) / Math.sqrt(1 - ab)); // (8) for the noise
    }
    const sigma = sigmaOf(ab, ab_prev, eta);
    const rest = Math.sqrt(Math.max(0, 1 - ab_prev - sigma ** 2));
    x = x0.map((x0, i) => Math.sqrt(ab_prev) * x0 + rest * noise[i]); // math.md (9)
    if (sigma > 0) x = x.map((x) => x + sigma * generator.normal()); // not in the last step

    if (onStep) x = await onStep(x, t_prev, x0);
  }
  return x;
}

/** The standard deviation of the fresh noise in x_{t_prev}; 0 in the last step. math.md (10) */
export function sigmaOf(ab, ab_prev, eta) {
  return eta * Math.sqrt(((1 - ab_prev) / (1 - ab)) * (1 - ab / ab_prev));
}

/** [t, t_prev] of even strides from T-1 to -1: [999, 974], ..., [24, -1] for 40 of 1000. */
export function timestepPairs(T, steps) {
  if (!(Number.isInteger(steps) && steps >= 1 && steps <= T))
    throw RangeError(`expected 1 to ${T} steps, as the schedule has ${T}, got ${steps}`);
  const t = (i) => roundHalfEven((T * i) / steps) - 1;
  return Array.from({ length: steps }, (_, k) => [t(steps - k), t(steps - k - 1)]);
}

/** Python's round: 62.5 becomes 62. Math.round would make it 63. */
function roundHalfEven(number) {
  const floor = Math.floor(number);
  return number - floor === 0.5 ? floor + (floor % 2) : Math.round(number);
}

/** Of latent_ext/guidance.py (Ho & Salimans 2021, eq. 6): exaggerate what the context changes. */
export function guided(predictNoise, context, nullContext, guidanceScale) {
  if (guidanceScale === 0 || guidanceScale === 1) // one of the two is all of it: half the work
    return (x, t) => predictNoise(x, t, guidanceScale === 1 ? context : nullContext);
  return async (x, t) => {
    const unconditional = await predictNoise(x, t, nullContext);
    const conditional = await predictNoise(x, t, context);
    return unconditional.map((u, i) => u + guidanceScale * (conditional[i] - u)); // math.md (18)
  };
}

/** Standard normal numbers from a seed: mulberry32, then Box & Muller 1958. Not PyTorch's. */
export class Generator {
  constructor(seed) {
    this.state = seed;
  }

  uniform() {
    this.state = (this.state + 0x6d2b79f5) | 0;
    let bits = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state);
    bits = (bits + Math.imul(bits ^ (bits >>> 7), 61 | bits)) ^ bits;
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32; // in [0, 1)
  }

  normal() {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return radius * Math.cos(2 * Math.PI * this.uniform());
  }

  randn(n) {
    return Float32Array.from({ length: n }, () => this.normal());
  }
}
