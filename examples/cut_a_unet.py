"""Full and shallow modules of a U-Net in PyTorch alone: both equal the U-Net to the bit."""

import torch
from diffusers import UNet2DConditionModel

import fastcache
from fastcache.demo import MODEL_DIRECTORY

unet = UNet2DConditionModel.from_pretrained(MODEL_DIRECTORY, subfolder="unet")
sample, timestep, text = torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 32, 128)
with torch.no_grad():
    expected = unet(sample, timestep, text).sample
    for branch_id in (0, 3, 6):
        cut = fastcache.partition_unet(unet, branch_id=branch_id)
        noise_pred, cached_feature = cut.full(sample, timestep, text)
        again = cut.shallow(sample, timestep, text, cached_feature=cached_feature)
        assert torch.equal(noise_pred, expected)
        assert torch.equal(again, expected)
        print(f"branch {branch_id}: the cached feature is {tuple(cached_feature.shape)}")
