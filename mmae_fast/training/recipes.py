"""Named settings of ``mmae pretrain --recipe NAME``. Knows the standard library only."""

from __future__ import annotations

from dataclasses import replace

from mmae_fast.training.config import DataConfig, LossConfig, ModelConfig, PretrainConfig

# 28-32 pixel images on a CPU or any GPU.
TINY = ModelConfig(
    patch_size=4,
    embed_dim=128,
    depth=4,
    num_heads=4,
    decoder_embed_dim=64,
    decoder_depth=1,
    decoder_num_heads=4,
)
VIT_TINY = ModelConfig(
    patch_size=4,
    embed_dim=192,
    depth=12,
    num_heads=3,
    decoder_embed_dim=192,
    decoder_depth=4,
    decoder_num_heads=3,
)
VIT_B = ModelConfig()
VIT_L = ModelConfig(embed_dim=1024, depth=24, num_heads=16)


def _imagenet(model: ModelConfig, loss: LossConfig) -> PretrainConfig:
    """The published schedule and augmentation, PretrainConfig's defaults, in bf16 for fp16."""
    return PretrainConfig(DataConfig(img_size=224), model, loss=loss, precision="bf16")


# The published M-MAE code regularises the class token after two final norms, and its gradient of
# the regulariser is 1/W of the true one on W GPUs (grad_scale="sum"; it was run on 8). The same on
# any number of GPUs: --loss.grad-scale mean --loss.weight 0.00125. Its ViT-L was probably centred:
# the switch that should have turned that off did not.
RECIPES: dict[str, tuple[str, PretrainConfig]] = {
    "mmae-vit-b-in1k": (
        "M-MAE as published, ViT-B/16, 224 pixels, mu 1",
        _imagenet(replace(VIT_B, double_norm=True), LossConfig("m_mae", mu=1.0, grad_scale="sum")),
    ),
    "mmae-vit-l-in1k": (
        "M-MAE as published, ViT-L/16, 224 pixels, mu 3, centred",
        _imagenet(
            replace(VIT_L, double_norm=True),
            LossConfig("m_mae", mu=3.0, center=True, grad_scale="sum"),
        ),
    ),
    "mae-vit-b-in1k": ("MAE, ViT-B/16, 224 pixels", _imagenet(VIT_B, LossConfig("mae"))),
    "mae-vit-l-in1k": ("MAE, ViT-L/16, 224 pixels", _imagenet(VIT_L, LossConfig("mae"))),
    "umae-vit-b-in1k": ("U-MAE, ViT-B/16, 224 pixels", _imagenet(VIT_B, LossConfig("u_mae"))),
    "umae-vit-l-in1k": ("U-MAE, ViT-L/16, 224 pixels", _imagenet(VIT_L, LossConfig("u_mae"))),
    "cifar10": (
        "M-MAE, ViT-Tiny/4 on CIFAR-10",
        PretrainConfig(
            data=DataConfig(train="cifar10"),
            model=VIT_TINY,
            epochs=200,
            warmup_epochs=20,
            batch_size=512,
            base_lr=1e-3,
            min_crop=0.3,
            precision="bf16",
        ),
    ),
    "tiny": (
        "0.9 M parameters, patch 4, for 28-32 pixel images",
        PretrainConfig(model=TINY, epochs=20, warmup_epochs=2, batch_size=256, base_lr=1e-3),
    ),
}
