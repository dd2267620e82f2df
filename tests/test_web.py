"""web/: the sampler in JavaScript against processes.py, and the page in a real browser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import processes
from processes import NoiseSchedule

WEB = Path(__file__).parents[1] / "web"

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")


def node(script: str, **values: object) -> object:
    """What an ES module prints as JSON; `values` are global constants of it, sampler.js is `s`."""
    constants = "".join(f"const {name} = input.{name};\n" for name in values)
    script = f"""import fs from "node:fs";
        import * as s from "./sampler.js";
        const input = JSON.parse(fs.readFileSync(0, "utf8"));
        {constants}
        const print = (result) => console.log(JSON.stringify(result));
        {script}"""
    result = subprocess.run(
        ["node", "--input-type=module", "-e", script],
        cwd=WEB,
        input=json.dumps(values),
        capture_output=True,
        text=True,
    )
    assert not result.returncode, result.stderr
    return json.loads(result.stdout)


@needs_node
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "flow"])
@pytest.mark.parametrize("T", [1000, 7])
def test_schedules_are_those_of_processes(name, T):
    ours = node("print([...s.NoiseSchedule.named(name, T).alphaBar])", name=name, T=T)
    theirs = getattr(NoiseSchedule, name)(T).alpha_bar.tolist()
    assert ours == pytest.approx(theirs, rel=1e-5)


@needs_node
def test_timestep_pairs_are_those_of_processes():
    ours = node("print([...Array(1000).keys()].map((i) => s.timestepPairs(1000, i + 1)))")
    assert ours == [[[*p] for p in processes.timestep_pairs(1000, n)] for n in range(1, 1001)]


def draw(generator):
    return torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)


def network(x_t, t, context=0.0):
    """Any function will do: this one has no symmetry that could hide a mistake."""
    t = t.to(x_t).view(-1, 1, 1, 1)
    return torch.tanh(0.7 * x_t + t / 1000 + context) + 0.3 * context


NETWORK = """const network = (x_t, t, context = 0) =>
    x_t.map((x) => Math.tanh(0.7 * x + t / 1000 + context) + 0.3 * context);"""


@needs_node
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("guidance", [None, 0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    ("output", "clip_x0", "skip"), [("v", True, 0), ("noise", False, 5), ("velocity", False, 0)]
)
def test_sample_equals_processes_at_every_step(eta, guidance, output, clip_x0, skip):
    """In float64: near pure noise x0 is a difference of nearly equal numbers, divided by 1e-4."""
    schedule = NoiseSchedule.cosine()
    wrap = {"v": "noise_from_v", "velocity": "noise_from_velocity"}.get(output)
    predict_noise = getattr(processes, wrap)(network, schedule) if wrap else network
    if guidance is not None:
        both = predict_noise

        def predict_noise(x, t):  # the definition of guidance, without its short cuts
            unconditional = both(x, t, torch.tensor(-0.5))
            return unconditional + guidance * (both(x, t, torch.tensor(0.4)) - unconditional)

    pairs = processes.timestep_pairs(schedule.T, 12)[skip:]
    generator = torch.Generator().manual_seed(0)
    x0, z, *fresh = (draw(generator) for _ in range(2 + len(pairs)))
    x, _ = processes.add_noise(x0, torch.tensor([pairs[0][0]]), schedule, z)
    generator.manual_seed(0)
    draw(generator), draw(generator)  # those of x0 and z
    steps = []
    processes.sample(
        predict_noise,
        x,
        schedule,
        eta=eta,
        timesteps=pairs,
        clip_x0=clip_x0,
        generator=generator,
        on_step=lambda x, t_prev, x0: steps.append((t_prev, x, x0)) or 0.9 * x,
    )
    ours = node(
        NETWORK
        + """
        const schedule = s.NoiseSchedule.cosine(), steps = [];
        const wrap = { v: s.noiseFromV, velocity: s.noiseFromVelocity, noise: (f) => f }[output];
        let predictNoise = wrap(network, schedule);
        if (guidance !== null) predictNoise = s.guided(predictNoise, 0.4, -0.5, guidance);
        const onStep = (x, t_prev, x0) => {
            steps.push([t_prev, [...x], [...x0]]);
            return x.map((x) => 0.9 * x);
        };
        const generator = { normal: () => fresh.shift() };
        const options = { eta, timesteps: pairs, clipX0, generator, onStep };
        const x = s.addNoise(Float64Array.from(x0), pairs[0][0], schedule, z);
        await s.sample(predictNoise, x, schedule, options);
        print(steps);""",
        x0=x0.flatten().tolist(),
        z=z.flatten().tolist(),
        fresh=torch.stack(fresh).flatten().tolist(),
        eta=eta,
        pairs=pairs,
        guidance=guidance,
        output=output,
        clipX0=clip_x0,
    )
    assert len(ours) == len(steps) == len(pairs)
    for (t_prev, x, x0), (their_t_prev, their_x, their_x0) in zip(ours, steps, strict=True):
        assert t_prev == their_t_prev
        assert x == pytest.approx(their_x.flatten().tolist(), abs=1e-6)
        assert x0 == pytest.approx(their_x0.flatten().tolist(), abs=1e-6)
