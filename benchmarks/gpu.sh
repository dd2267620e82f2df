#!/bin/sh
# All that a GPU should tell about this repository, in order: sh benchmarks/gpu.sh [RESULTS]
# PHOTOS is a folder of cat photographs; without it that part is left out. SHORT=1 tries every
# command with a few steps, on any device; DEVICE=cpu takes another device than cuda.
set -eu
results=${1:-runs/gpu}
device=${DEVICE:-cuda}
short=${SHORT:-}
mkdir -p "$results"

steps() { # the number of steps, or a few
    if [ "$short" ]; then echo 2; else echo "$1"; fi
}

measure() { # NAME COMMAND...: its output, and how long it took
    name=$1
    shift
    echo "== $name: $*"
    start=$(date +%s)
    "$@" 2>&1 | tee "$results/$name.log"
    echo "seconds: $(($(date +%s) - start))" | tee -a "$results/$name.log"
}

n=$(if [ "$short" ]; then echo 4; else echo 256; fi)
rounds=$(if [ "$short" ]; then echo 1; else echo 20; fi)

# 1. The default training: minutes and images a second, and a step with and without torch.compile.
measure train python train.py --device "$device" --steps "$(steps 3300)" --out "$results/cats"
measure evaluate python evaluate.py --device "$device" --model "$results/cats/model.pt" --n "$n" \
    --out "$results/evaluation.png"
measure step python -m benchmarks.speed --device "$device" --precision float32 bfloat16 \
    --rounds "$rounds"
if [ ! "$short" ]; then
    measure step-compiled python -m benchmarks.speed --device "$device" --compile \
        --precision float32 bfloat16 --rounds "$rounds"
fi

# 2. Real cats, as good as a file of 16 MB allows.
if [ "${PHOTOS:-}" ]; then
    measure real-cats python train.py --device "$device" --data "$PHOTOS" \
        --steps "$(steps 100000)" --batch 64 --out "$results/real-cats"
    measure evaluate-real-cats python evaluate.py --device "$device" --data "$PHOTOS" --order 2 \
        --model "$results/real-cats/model.pt" --n "$n" --out "$results/real-evaluation.png"
fi

# 3. CIFAR-10 by class, for about 20 minutes.
measure cifar10 python -m latent_ext.train classes --data cifar10 --device "$device" \
    --steps "$(steps 40000)" --batch 64 --out "$results/cifar10"
measure evaluate-cifar10 python -m latent_ext.evaluate --data cifar10 --device "$device" \
    --model "$results/cifar10/model.pt" --n "$n" --guidance 1 3

# 4. Stable Diffusion v1.5's U-Net, ours and diffusers': seconds and memory of a call.
if [ ! "$short" ]; then
    measure v15 python -m benchmarks.speed --v15 --size 64 --device "$device" \
        --precision float32 bfloat16 --rounds "$rounds"
fi
