"""What is pretrained: the masked autoencoder of MAE [1] and encoders with two branches.

The vision transformer is built from timm's blocks under the official parameter names.

[1] He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377
[2] Zbontar et al., Barlow Twins, arXiv:2103.03230 (the projector)
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models.vision_transformer import Block, PatchEmbed
from torch import Tensor, nn

from mmae_fast.training.config import (
    METHODS,
    ModelConfig,
    PretrainConfig,
    TwoBranchConfig,
    UserError,
)

# Images up to this side leave a ResNet's usual stem, which divides them by four, too little.
SMALL_IMAGE = 64
# The published M-MAE model also carries an online classifier; it is no part of the autoencoder.
_CLASSIFIER_PREFIXES = ("fc.", "fc_norm.", "head.")


LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class MaeOutput(NamedTuple):
    """What one masked forward pass gives. B images, L patches, V of them visible."""

    loss: Tensor  # (), float32: mean squared error over masked patches
    pred: Tensor  # (B, L, patch_size² · C)
    mask: Tensor  # (B, L): 1 where the patch was hidden from the encoder
    latent: Tensor  # (B, 1 + V, embed_dim), class token first, after the final norm
    features: Tensor  # (B, embed_dim): the class token that the regulariser sees


class VisionTransformer(nn.Module):
    """The encoder: patches, class token, fixed positions, timm's blocks, final norm.

    Args:
        img_size: height and width in pixels, or one number for both.
        patch_size: side of a patch in pixels; must divide both.
        in_chans: channels of the images, any number.
    Raises: ValueError: sizes that do not fit, with the values received.
    """

    num_prefix_tokens = 1  # the class token, before the patches
    position_tables = ("pos_embed",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        _check_patches(height, width, patch_size)
        _check_heads("embed_dim", embed_dim, num_heads)
        self.patch_embed = PatchEmbed((height, width), patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_2d(embed_dim, self.patch_embed.grid_size))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, qkv_bias=True, norm_layer=LAYER_NORM) for _ in range(depth)
        )
        self.norm = LAYER_NORM(embed_dim)
        self.num_features = embed_dim

    def initialise(self) -> None:
        """Weights as in the published MAE code; to be called when all modules are there."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch projection is a linear layer in a convolution's clothes.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

    def forward_features(self, imgs: Tensor, pool: str = "cls") -> Tensor:
        """Features of whole, unmasked images: ``(B, C, H, W)`` to ``(B, embed_dim)``.

        ``pool="cls"`` takes the class token, ``"mean"`` the mean of the patch tokens.
        """
        latent = self._encode(self._embed(imgs))
        if pool == "cls":
            return latent[:, 0]
        if pool == "mean":
            return latent[:, 1:].mean(dim=1)
        raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")

    def load_published(self, state: dict[str, Tensor]) -> None:
        """Load the state dict of the public MAE, U-MAE or M-MAE code, strictly.

        The classifier that those models may carry is left out; anything else that is missing,
        unexpected or of another shape raises RuntimeError.
        """
        kept = {k: v for k, v in state.items() if not k.startswith(_CLASSIFIER_PREFIXES)}
        self.load_state_dict(kept, strict=True)

    def resize(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from here on: positions are resampled (timm's, bicubic).

        Raises: ValueError: patches that do not fit, with the values received.
        """
        patches, old = self.patch_embed, list(self.patch_embed.grid_size)
        height, width = to_2tuple(img_size)
        side = patches.patch_size[0]
        _check_patches(height, width, side)
        new = [height // side, width // side]
        if new == old:
            return
        patches.img_size, patches.grid_size = (height, width), tuple(new)
        patches.num_patches = new[0] * new[1]
        for name in self.position_tables:
            setattr(self, name, resample_abs_pos_embed(getattr(self, name), new, old))

    def _embed(self, imgs: Tensor) -> Tensor:
        return self.patch_embed(imgs) + self.pos_embed[:, 1:]

    def _encode(self, tokens: Tensor) -> Tensor:
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([cls_token.to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MaskedAutoencoder(VisionTransformer):
    """Encoder on the visible patches, light decoder on all of them.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads: of the encoder.
        mask_ratio: share of the patches hidden from the encoder, in [0, 1).
        norm_pix_loss: targets are patches normalised by their own mean and standard deviation.
        double_norm: ``features`` pass the final norm twice, as in the published M-MAE code.
    Raises: ValueError: sizes that do not fit, with the values received.
    """

    position_tables = ("pos_embed", "decoder_pos_embed")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        double_norm: bool = False,
    ) -> None:
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
        _check_heads("decoder_embed_dim", decoder_embed_dim, decoder_num_heads)
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads)
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.double_norm = double_norm

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        grid = self.patch_embed.grid_size
        self.register_buffer("decoder_pos_embed", sincos_2d(decoder_embed_dim, grid))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, qkv_bias=True, norm_layer=LAYER_NORM)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = LAYER_NORM(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.initialise()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, imgs: Tensor, noise: Tensor | None = None, features_only: bool = False
    ) -> MaeOutput | Tensor:
        """Mask, encode, decode, score.

        Args:
            imgs: normalised images, shape ``(B, C, H, W)``.
            noise: shape ``(B, L)``; the patches of smallest noise stay visible. Default: uniform.
            features_only: stop after encoding and return ``features``.
        """
        tokens = self._embed(imgs)
        if noise is None:
            noise = torch.rand(tokens.shape[:2], device=tokens.device)
        visible, mask, ids_restore = random_masking(tokens, noise, self.mask_ratio)
        latent = self._encode(visible)
        features = self.norm(latent[:, 0]) if self.double_norm else latent[:, 0]
        if features_only:
            return features
        pred = self._decode(latent, ids_restore)
        return MaeOutput(self.loss(imgs, pred, mask), pred, mask, latent, features)

    def _decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        hidden = ids_restore.shape[1] + 1 - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), hidden, -1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        order = ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[2])
        x = torch.cat([x[:, :1], patches.gather(1, order)], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the masked patches, in float32 whatever autocast says."""
        with torch.autocast(imgs.device.type, enabled=False):
            target = self.patchify(imgs.float())
            if self.norm_pix_loss:
                mean, std = _patch_stats(target)
                target = (target - mean) / std
            per_patch = (pred.float() - target).square().mean(dim=-1)
            return (per_patch * mask).sum() / mask.sum().clamp(min=1)

    def reconstruct(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Images with the masked patches predicted and the visible ones as they are.

        Predictions of normalised patches get the true mean and standard deviation back: the model
        was never asked for them. All images ``(B, C, H, W)``, on the scale of ``imgs``.
        """
        target = self.patchify(imgs.float())
        if self.norm_pix_loss:
            mean, std = _patch_stats(target)
            pred = pred.float() * std + mean
        return self.unpatchify(torch.where(mask.unsqueeze(-1).bool(), pred, target))

    def patchify(self, imgs: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, L, patch_size² · C)``; channels run fastest, as in MAE."""
        (rows, cols), p = self.patch_embed.grid_size, self.patch_embed.patch_size[0]
        b, c = imgs.shape[:2]
        x = imgs.reshape(b, c, rows, p, cols, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * cols, p * p * c)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Inverse of ``patchify``."""
        (rows, cols), p = self.patch_embed.grid_size, self.patch_embed.patch_size[0]
        x = patches.reshape(len(patches), rows, cols, p, p, -1)
        b, c = len(x), x.shape[-1]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * p, cols * p)


class ResNet(nn.Module):
    """torchvision's ResNet-18 without its classifier; features are its 512 channel means."""

    def __init__(self, img_size: tuple[int, int], in_chans: int) -> None:
        super().__init__()
        # Imported here: the other models do not need torchvision.
        from torchvision.models import resnet18

        net = resnet18(num_classes=1)
        self.num_features = net.fc.in_features
        net.fc = nn.Identity()
        if max(img_size) <= SMALL_IMAGE:
            net.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        else:
            net.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.net = net

    def forward_features(self, imgs: Tensor, pool: str = "mean") -> Tensor:
        """``(B, C, H, W)`` to ``(B, 512)``. There is no class token: ``pool`` changes nothing."""
        return self.net(imgs)


class TwoBranch(nn.Module):
    """Encoder and projector that both views of an image pass through.

    Args:
        backbone: module with ``forward_features(images) -> (B, D)`` and ``num_features`` = D.
        hidden, dim: width of the projector's two hidden layers and of its output. Linear,
            BatchNorm, ReLU, twice, then linear and BatchNorm without weights, as in [2].
    """

    def __init__(self, backbone: VisionTransformer | ResNet, hidden: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """Two views ``(B, C, H, W)`` to their projections ``(B, dim)``, float32.

        The branches pass one after the other, so that BatchNorm sees one view at a time.
        """
        return self.projector(self.backbone.forward_features(view1)).float(), self.projector(
            self.backbone.forward_features(view2)
        ).float()

    def forward_features(self, imgs: Tensor, pool: str = "cls") -> Tensor:
        """Features of the encoder, before the projector: ``(B, D)``."""
        return self.backbone.forward_features(imgs, pool)


def random_masking(
    tokens: Tensor, noise: Tensor, mask_ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the tokens of smallest noise, in that order.

    Args:
        tokens: shape ``(B, L, D)``.
        noise: shape ``(B, L)``.
    Returns: visible tokens ``(B, V, D)`` with ``V = int(L · (1 − mask_ratio))``; mask ``(B, L)``,
        1 where hidden; ``ids_restore (B, L)``, the place of each patch among visible-then-hidden.
    """
    length, dim = tokens.shape[1:]
    keep = int(length * (1 - mask_ratio))
    if keep < 1:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of {length} patches visible")
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    visible = tokens.gather(1, ids_shuffle[:, :keep].unsqueeze(-1).expand(-1, -1, dim))
    mask = (ids_restore >= keep).to(torch.float32)
    return visible, mask, ids_restore


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed sin-cos position embedding, shape ``(1, 1 + rows · cols, dim)``, float32.

    The first half of the features encodes the column, the second the row, each as sines then
    cosines; the class token's row is zero. Computed in float64, as the published models did.
    """
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(positions: Tensor) -> Tensor:
        angles = positions.flatten().double().outer(omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, col = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    patches = torch.cat([encode(col), encode(row)], dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()]).unsqueeze(0)


def _check_patches(height: int, width: int, patch_size: int) -> None:
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size must divide the image size, got {patch_size} for {height}x{width}"
        )


def _check_heads(name: str, dim: int, heads: int) -> None:
    if dim % heads or dim % 4:
        raise ValueError(
            f"{name} must be a multiple of its heads and of 4, got {dim} with {heads} heads"
        )


def _patch_stats(patches: Tensor) -> tuple[Tensor, Tensor]:
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def build_model(
    config: PretrainConfig, img_size: tuple[int, int], in_chans: int
) -> MaskedAutoencoder | TwoBranch:
    """Model of a configuration for images of a given height, width and number of channels."""
    try:
        if METHODS[config.loss.method][0] is not None:
            return MaskedAutoencoder(img_size, in_chans=in_chans, **vars(config.model))
        return _build_two_branch(config.model, config.two_branch, img_size, in_chans)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build_two_branch(
    model: ModelConfig, config: TwoBranchConfig, img_size: tuple[int, int], in_chans: int
) -> TwoBranch:
    if min(config.projector_hidden, config.projector_dim) < 1:
        raise ValueError(
            "the projector's widths must be >= 1, got "
            f"{config.projector_hidden} and {config.projector_dim}"
        )
    if config.backbone == "resnet18":
        backbone = ResNet(img_size, in_chans)
    else:
        sizes = (model.patch_size, in_chans, model.embed_dim, model.depth, model.num_heads)
        backbone = VisionTransformer(img_size, *sizes)
        backbone.initialise()
    return TwoBranch(backbone, config.projector_hidden, config.projector_dim)
