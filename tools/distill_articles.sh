#!/bin/sh
# The articles' distillations as commands: ResNet and Inception teach MobileNets of torchvision and timm, then int8.
#
#     sh tools/distill_articles.sh OUT        torchvision and timm are to be there; five minutes on one core
#
# Models are drawn at random and samples are made up: this shows that the commands work, not what they are worth.
# Yours: --factory package.module:function --weights FILE, --teacher package.module:function@FILE, --data train.npz.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")"

teach() { python -m graphopt distill --data article_models:samples --epochs 3 --temperature 4 --passes int8 --no-bench "$@"; }

# soft labels, half of the loss
teach --factory article_models:mobilenet --teacher article_models:resnet18 --alpha 0.5 -o "$out/resnet-0.5"
# soft labels, 0.7 of the loss
teach --factory article_models:mobilenet --teacher article_models:resnet18 --alpha 0.7 -o "$out/resnet-0.7"
# features at the ends of stages (FitNets), behind 1x1 convolutions that are dropped again
teach --factory article_models:mobilenet --teacher article_models:resnet18 --features stages -o "$out/resnet-features"
# Inception and timm's MobileNetV3
teach --factory article_models:timm_mobilenet --teacher article_models:inception --alpha 0.5 -o "$out/inception-0.5"
teach --factory article_models:timm_mobilenet --teacher article_models:inception --alpha 0.7 --features stages \
    -o "$out/inception-features"
# both teach, and the ResNet counts twice
cat > "$out/plan.toml" <<'PLAN'
temperature = 4.0
alpha = 0.7
epochs = 1

[[teachers]]
weight = 2.0

[[teachers]]

[[pairs]]
student = "features.13"     # an address in torchvision's MobileNetV2
teacher = "layer3"          # and in the first teacher
loss = "attention"
PLAN
python -m graphopt distill --factory article_models:mobilenet --data article_models:samples --plan "$out/plan.toml" \
    --teacher article_models:resnet18 --teacher article_models:inception --passes int8 --no-bench -o "$out/both"
