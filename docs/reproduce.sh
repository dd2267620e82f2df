#!/bin/sh
# Makes a pretrained model anew, as it was made, and measures it: sh docs/reproduce.sh NAME
# Repeat the command to resume. The minutes are those of 2 cores of an AMD Zen 5 with bfloat16.
set -eu
name=${1:-none}
out=runs/reproduce/$name
case $name in
cats) # 13 minutes, and 3 for the evaluation
    python train.py --steps 9000 --out "$out"
    python evaluate.py --model "$out/model.pt" --out "$out/evaluation.png"
    ;;
real-cats) # 55 minutes, and 3; PHOTOS: a folder of photographs
    python train.py --data "${PHOTOS:?expected a folder}" --out "$out" --steps 15000
    python evaluate.py --model "$out/model.pt" --data "$PHOTOS" --order 2 \
        --out "$out/evaluation.png"
    ;;
digits) # 6 minutes, and 4
    python -m latent_ext.train classes --data mnist --out "$out"
    python -m latent_ext.evaluate --model "$out/model.pt" --data mnist --guidance 1 3
    ;;
latent-cats) # 11 minutes, and 5
    python -m latent_ext.train all --out "$out"
    python -m latent_ext.evaluate --model "$out" --guidance 1 2 3
    ;;
*)
    echo "expected cats, real-cats, digits or latent-cats, got $name" >&2
    exit 2
    ;;
esac
