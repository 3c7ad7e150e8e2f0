"""Train the bundled model from nothing: python tools/train_demo.py train --output fastcache/demo/model

Five stages, each seeded: the VAE learns to code rendered scenes; the text encoder learns to say what a caption says
at each place; the U-Net and the text encoder together learn v-prediction on SD 2.1's noise schedule; both learn on, on
new scenes, while the learning rate falls to nothing; and the VAE's decoder, made deeper, learns to make true pictures
of what the U-Net draws. A stage that has finished is kept in --work and not run again. Two CPU cores need some four
hours.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save
from scipy.ndimage import map_coordinates
from scipy.optimize import least_squares
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import fastcache
from fastcache.demo import MODEL_DIRECTORY, reader
from fastcache.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    held_out_scenes,
    outlines,
    render,
    render_at,
    training_scenes,
)
from fastcache.files import write_whole

TOKENS = 32
TEXT_WIDTH = 128
LATENT_SIZE = 16
STOP_AT = 3000
DRAWN_WITH = ((50, 3), (20, 1), (25, 1), (30, 2))  # steps and cache interval of what the decoder learns from
DEPTH = 2  # the finished VAE's layers_per_block; the first stages have one
FAR = 650.0  # mean squared difference of 8-bit pixels, 20 dB: another shape or colour, where half are under 100
LAST = "fastcache.json"  # of a model's files, the one that is written last


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 3, 4, 4),
        use_linear_projection=True,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges give each word of the captions one token, and spell out any other word."""
    rng = np.random.default_rng(0)
    captions = [scene.partial_caption(rng) for scene, _ in zip(training_scenes(rng), range(4000), strict=False)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    tokens = [*sorted(letters), *(f"{c}</w>" for c in sorted(letters))]
    merges = [tuple(m) for m in model["merges"]]
    tokens += [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, model_max_length=TOKENS)
    tokenize(tokenizer, [""])  # its file keeps how it was last called
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def pictures(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(np.stack([render(s, rng) for s in scenes])).permute(0, 3, 1, 2)


def take(rng: np.random.Generator, count: int) -> list[Scene]:
    return [scene for scene, _ in zip(training_scenes(rng), range(count), strict=False)]


def normalised(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


class Log:
    """A line every so many iterations, with the time taken."""

    def __init__(self, stage: str, every: int) -> None:
        self.stage, self.every, self.start, self.values = stage, every, time.monotonic(), list[float]()

    def __call__(self, iteration: int, value: float) -> None:
        self.values.append(value)
        if iteration % self.every == 0:
            minutes = (time.monotonic() - self.start) / 60
            mean = np.mean(self.values[-self.every :])
            typer.echo(f"{self.stage} {iteration:6d}  loss {mean:.5f}  {minutes:.1f} min", err=True)


def schedule(
    optimizer: torch.optim.Optimizer, iterations: int, warmup: int = 100
) -> torch.optim.lr_scheduler.LRScheduler:
    def factor(i: int) -> float:
        decay = 0.5 + 0.5 * np.cos(np.pi * i / iterations)
        return min(1.0, (i + 1) / warmup) * max(0.01, decay)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def descend(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, rate: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """One step down, with the gradient's length held to 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    rate.step()


def train_vae(iterations: int) -> AutoencoderKL:
    """L1 + L2 reconstruction, with the KL term at a weight that leaves 31 dB or more."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    vae = build_vae().to(memory_format=torch.channels_last)
    images = pictures(take(rng, 20000), rng)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    rate, log = schedule(optimizer, iterations), Log("vae", 50)
    for i in range(1, iterations + 1):
        x = normalised(images[torch.randint(len(images), (16,))]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y, kl = vae.decode(posterior.sample()).sample.float(), posterior.kl().float().mean()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 3e-4 * kl / (4 * LATENT_SIZE**2)
        descend(loss, vae, optimizer, rate)
        log(i, loss.item())
    with torch.no_grad():
        x = normalised(images[:256])
        latents = vae.encode(x).latent_dist.mode()
        mse = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), x)
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    typer.echo(f"vae: {10 * np.log10(4 / mse.item()):.2f} dB, scale {vae.config.scaling_factor}", err=True)
    return vae


def describe_targets(scenes: list[Scene]) -> Tensor:
    """For each place the shape, colour and size there (0 for nothing), and the background.

    Shapes: returns (scenes, 13) class indices.
    """
    rows: list[list[int]] = []
    for scene in scenes:
        at = {o.place: o for o in scene.objects}
        row = [list(BACKGROUNDS).index(scene.background)]
        for place in PLACES:
            o = at.get(place)
            row += [1 + list(n).index(v) if o else 0 for n, v in _attributes(o)]
        rows.append(row)
    return torch.tensor(rows)


def _attributes(o: object) -> list[tuple[dict[str, object], str]]:
    return [(SHAPES, getattr(o, "shape", "")), (COLOURS, getattr(o, "colour", "")), (RADII, getattr(o, "size", ""))]


def train_text(tokenizer: CLIPTokenizer, iterations: int) -> CLIPTextModel:
    """Full captions: the last token's state tells, by linear heads, what stands at each place."""
    torch.manual_seed(2)
    rng = np.random.default_rng(2)
    encoder = build_text_encoder(tokenizer)
    widths = [len(BACKGROUNDS)] + [len(SHAPES) + 1, len(COLOURS) + 1, len(RADII) + 1] * len(PLACES)
    heads = nn.Linear(TEXT_WIDTH, sum(widths))
    scenes = take(rng, 40000)
    ids, targets = tokenize(tokenizer, [s.caption() for s in scenes]), describe_targets(scenes)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], 1e-3, weight_decay=0.01)
    rate, log = schedule(optimizer, iterations), Log("text", 200)
    for i in range(1, iterations + 1):
        rows = torch.randint(len(ids), (128,))
        states = encoder(ids[rows]).last_hidden_state[:, -1]
        logits = heads(states).split(widths, dim=-1)
        loss = torch.stack([F.cross_entropy(p, targets[rows, k]) for k, p in enumerate(logits)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        log(i, loss.item())
    return encoder


def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [vae.encode(normalised(x)).latent_dist.mode() for x in images.split(256)]
    return torch.cat(parts) * vae.config.scaling_factor


def v_prediction_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_unet(
    pipe: Any, iterations: int, stop: int, rate: float, seed: int, work: Path
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """v-prediction, one caption in ten empty for guidance; returns the running average of the weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae, text, tokenizer = pipe.vae, pipe.text_encoder.train(), pipe.tokenizer
    unet = pipe.unet.train().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # on a CPU the backward of the fused attention takes four times as long
    typer.echo(f"unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters", err=True)
    scenes = take(rng, 60000)
    latents = encode_images(vae, pictures(scenes, rng))
    captions = [s.partial_caption(rng) if rng.random() >= 0.1 else "" for s in scenes]
    ids = tokenize(tokenizer, captions)
    alphas = v_prediction_scheduler().alphas_cumprod
    model = nn.ModuleDict({"unet": unet, "text": text})
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    rates, log = schedule(optimizer, iterations, warmup=200), Log("unet", 50)
    for i in range(1, stop + 1):
        rows = torch.randint(len(latents), (64,))
        t = torch.randint(1000, (64,))
        x, noise = latents[rows], torch.randn(64, 4, LATENT_SIZE, LATENT_SIZE)
        a, b = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noisy = (a * x + b * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            states = text(ids[rows]).last_hidden_state
            v = unet(noisy, t, states, return_dict=False)[0]
        loss = F.mse_loss(v.float(), a * noise - b * x)
        descend(loss, model, optimizer, rates)
        decay = min(0.999, (1 + i) / (10 + i))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        log(i, loss.item())
        if i % 500 == 0:
            export(vae, average["text"], tokenizer, average["unet"], work / "latest")
            score = right_share(draw_held_out(plain_pipeline(work / "latest"), count=32, steps=20))
            typer.echo(f"unet {i:6d}  {score:.1%} of 32 held-out prompts, 20 steps", err=True)
    return average["unet"], average["text"]


def nearest_render(image: npt.NDArray[np.uint8], scene: Scene) -> npt.NDArray[np.uint8]:
    """The true picture of a scene that is nearest to an image of it: its objects' places and sizes by least squares."""
    start = outlines(scene)
    room = np.broadcast_to((2.5, 2.5, 1.0), start.shape).ravel()  # pixels; scenes vary by 1.5, 1.5 and 0.6

    def difference(at: npt.NDArray[np.float64]) -> npt.NDArray[np.floating]:
        return (render_at(scene, at.reshape(start.shape)) - image).ravel() / 255

    found = least_squares(
        difference,
        start.ravel(),
        bounds=(start.ravel() - room, start.ravel() + room),
        diff_step=0.004,  # of some tens of pixels, for edges are one pixel wide
        loss="soft_l1",
        max_nfev=12,
    )
    return render_at(scene, found.x.reshape(start.shape)).round().astype(np.uint8)


def draw_examples(model: Path, engines: Path, vae: AutoencoderKL, count: int) -> tuple[Tensor, Tensor]:
    """Latents that a model draws, and for each the true picture that is nearest to what the VAE makes of it.

    What is far from every true picture of its scene, as where a colour is wrong, is left out: nobody can say what it
    should be.

    Shapes: returns (N, 4, 16, 16) as the decoder takes them and (N, 3, 64, 64), RGB from 0 to 255.
    """
    fastcache.build_engines(model, engines, batch="1:16:16", force=True)
    pipe, scenes = fastcache.load(engines), take(np.random.default_rng(6), count)
    latents, targets = list[Tensor](), list[Tensor]()
    for start in range(0, count, 16):
        part = scenes[start : start + 16]
        steps, interval = DRAWN_WITH[start // 16 % len(DRAWN_WITH)]
        drawn: Tensor = pipe(
            [s.caption() for s in part],
            num_inference_steps=steps,
            guidance_scale=4.0,
            cache_interval=interval,
            generator=[torch.Generator().manual_seed(100_000 + start + k) for k in range(len(part))],
            output_type="latent",
        ).images
        coded = drawn.clone() / vae.config.scaling_factor
        with torch.no_grad():
            images = ((vae.decode(coded).sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        for z, image, scene in zip(coded, images.numpy(), part, strict=True):
            target = nearest_render(image, scene)
            if np.square(target - image.astype(np.float32)).mean() < FAR:
                latents.append(z)
                targets.append(torch.from_numpy(target).permute(2, 0, 1))
        typer.echo(f"drawn: {len(latents)} of {start + len(part)} kept, {count} wanted", err=True)
    if not latents:
        raise typer.BadParameter(
            f"expected a model that draws what captions say, got {model}: none of {count} pictures is near its scene; "
            "train the U-Net longer"
        )
    return torch.stack(latents), torch.stack(targets)


def deepened(vae: AutoencoderKL) -> AutoencoderKL:
    """The same VAE with `DEPTH` residual blocks at each size; new ones pass on what they are given until trained."""
    deep = AutoencoderKL.from_config({**vae.config, "layers_per_block": DEPTH})
    added = deep.load_state_dict(vae.state_dict(), strict=False).missing_keys
    with torch.no_grad():
        for name, parameter in deep.named_parameters():
            if name in added and ".conv2." in name:
                parameter.zero_()
    return deep


def train_decoder(vae: AutoencoderKL, drawn: tuple[Tensor, Tensor], iterations: int) -> None:
    """Sharpen the decoder, in place: L1 of colours and of the differences between neighbours, which are the edges.

    The encoder stays as it is, so the latents mean what they meant to the U-Net. A quarter of each batch are latents of
    true pictures. The others are latents that the model drew, which are never quite such ones: the decoder learns to
    make of them the true pictures nearest to them. Half of these are as they were drawn; in the other half what is
    wrong is larger, smaller or turned round, from place to place. All get a little noise.
    """
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    images = pictures(take(rng, 20000), rng)
    latents, right = (encode_images(vae, x) / vae.config.scaling_factor for x in (images, drawn[1]))
    spread, wrong = latents.std(), drawn[0] - right
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decoder.requires_grad_(True).parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    rates, log = schedule(optimizer, iterations), Log("decoder", 100)
    for i in range(1, iterations + 1):
        true, made = torch.randint(len(images), (4,)), torch.randint(len(right), (12,))
        x = normalised(torch.cat([images[true], drawn[1][made]]))
        varied = F.interpolate(torch.randn(6, 1, 4, 4), size=LATENT_SIZE, mode="bicubic")
        factor = torch.cat([torch.ones_like(varied), varied])
        z = torch.cat([latents[true], right[made] + factor * wrong[made]])
        noisy = z + spread * 0.1 * torch.rand(16, 1, 1, 1) * torch.randn_like(z)
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(noisy.contiguous(memory_format=torch.channels_last)).sample.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + edges
        descend(loss, decoder, optimizer, rates)
        log(i, loss.item())
    with torch.no_grad():
        mse = F.mse_loss(vae.decode(latents[:256]).sample.clamp(-1, 1), normalised(images[:256]))
    typer.echo(f"decoder: {10 * np.log10(4 / mse.item()):.2f} dB", err=True)


def pipeline_of(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=v_prediction_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel, output: Path
) -> None:
    """Write the four parts as a `StableDiffusionPipeline` in fp16 safetensors."""
    pipe = pipeline_of(copy.deepcopy(vae), copy.deepcopy(text), tokenizer, copy.deepcopy(unet))
    pipe.unet.to(memory_format=torch.contiguous_format)
    pipe.to(torch.float16, silence_dtype_warnings=True)
    for part in (pipe.vae, pipe.unet):
        part.register_to_config(_name_or_path="")  # where it was read from
    pipe.save_pretrained(output, safe_serialization=True)
    (output / LAST).write_text('{"guidance_scale": 4.0}\n', encoding="utf-8")  # what it was tuned for


def is_whole(model: Path) -> bool:
    """Whether `export` came to its end there."""
    return (model / LAST).is_file()


def plain_pipeline(model: Path) -> Any:
    """diffusers' own pipeline, in float32."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def draw_held_out(pipe: Any, count: int, steps: int, batch: int = 32) -> list[tuple[Scene, npt.NDArray[np.uint8]]]:
    """Held-out scenes and the images of their captions, drawn by diffusers' pipeline or a bundle's."""
    found = list[tuple[Scene, npt.NDArray[np.uint8]]]()
    scenes = held_out_scenes(count)
    for start in range(0, count, batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        images = pipe(
            [s.caption() for s in part],
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=generators,
            output_type="np",
        ).images
        found += zip(part, (images * 255).round().astype(np.uint8), strict=True)
    return found


def right_share(drawn: list[tuple[Scene, npt.NDArray[np.uint8]]]) -> float:
    """The share of images that show all that was asked for."""
    return float(np.mean([reader.matches(reader.read_scene(image), scene) for scene, image in drawn]))


def unevenness(image: npt.NDArray[np.uint8], scene: Scene) -> list[float]:
    """Of each circle seen in an image the standard deviation of its radius, in 48 directions, in pixels."""
    ground = np.array(BACKGROUNDS[scene.background], float)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    found = list[float]()
    for o in scene.objects:
        if o.shape != "circle":
            continue
        ahead = np.array(COLOURS[o.colour], float) - ground
        covered = np.clip((image - ground) @ ahead / (ahead @ ahead), 0, 1)
        centre_x, centre_y = PLACES[o.place]
        weight = covered * ((abs(x + 0.5 - centre_x) < 16) & (abs(y + 0.5 - centre_y) < 16))
        if not weight.any():
            continue
        middle = [[(weight * axis).sum() / weight.sum()] for axis in (y, x)]
        angles, steps = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.arange(0, 16, 0.25)
        rays = np.stack([np.outer(np.sin(angles), steps), np.outer(np.cos(angles), steps)])
        along = map_coordinates(covered, rays.reshape(2, -1) + middle, order=1, mode="nearest")
        found.append(float((along.reshape(rays.shape[1:]).sum(1) * 0.25).std()))
    return found


app = typer.Typer(add_completion=False, help="Train the bundled model from nothing, or measure one.")


@app.command("train")
def train_command(
    output: Annotated[Path, typer.Option(help="Where the finished model goes.")],
    work: Annotated[Path, typer.Option(help="Where finished stages are kept.")] = Path("build/train-demo"),
    vae_iterations: int = 3500,
    text_iterations: int = 1500,
    unet_iterations: Annotated[int, typer.Option(help="How many the learning rate's decay is laid out for.")] = 4000,
    unet_stop: Annotated[int, typer.Option(help="How many of them are run.")] = STOP_AT,
    start: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Learn on from this model, in place of the first stages."),
    ] = None,
    further_iterations: int = 2000,
    drawn: Annotated[
        int, typer.Option(min=1, help="How many pictures the decoder learns from that the U-Net draws.")
    ] = 4000,
    decoder_iterations: int = 9000,
    threads: int = 0,
) -> None:
    """Train the bundled model and say how many held-out prompts it draws right."""
    if threads:
        torch.set_num_threads(threads)
    first, further, examples = start or work / "first", work / "further", work / "drawn.safetensors"
    tokenizer = build_tokenizer()
    if start is None and not is_whole(first):
        train_first(first, work, tokenizer, vae_iterations, text_iterations, unet_iterations, unet_stop)
    if not is_whole(further):
        pipe = plain_pipeline(first)
        unet, text = train_unet(pipe, further_iterations, further_iterations, 4e-4, seed=4, work=work)
        export(pipe.vae, text, tokenizer, unet, further)
    pipe = plain_pipeline(further)
    if not examples.exists():
        latents, targets = draw_examples(further, work / "engines", pipe.vae, drawn)
        write_whole(examples, save({"latents": latents, "targets": targets}))
    vae, known = deepened(pipe.vae), load_file(examples)
    train_decoder(vae, (known["latents"], known["targets"]), decoder_iterations)
    export(vae, pipe.text_encoder, tokenizer, pipe.unet, output)
    measure_command(output)


def train_first(
    output: Path,
    work: Path,
    tokenizer: CLIPTokenizer,
    vae_iterations: int,
    text_iterations: int,
    iterations: int,
    stop: int,
) -> None:
    """The first three stages: VAE, text encoder, U-Net."""
    vae_folder, text_folder = work / "vae", work / "text"
    if not vae_folder.exists():
        train_vae(vae_iterations).save_pretrained(vae_folder)
    if not text_folder.exists():
        train_text(tokenizer, text_iterations).save_pretrained(text_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    torch.manual_seed(3)
    pipe = pipeline_of(vae, CLIPTextModel.from_pretrained(text_folder), tokenizer, build_unet())
    unet, text = train_unet(pipe, iterations, stop, 6e-4, seed=3, work=work)
    export(vae, text, tokenizer, unet, output)


@app.command("measure")
def measure_command(
    model: Annotated[Path, typer.Argument()] = MODEL_DIRECTORY,
    engines: Annotated[Path | None, typer.Option(help="Draw with this bundle instead, uncached.")] = None,
    count: int = 200,
    steps: int = 50,
) -> None:
    """Say for how many held-out prompts the image shows every attribute asked for, as `reader.py` reads it.

    And how round its circles are.
    """
    if engines is None:
        drawn = draw_held_out(plain_pipeline(model), count, steps)
    else:
        pipe = fastcache.load(engines)
        drawn = draw_held_out(pipe, count, steps, pipe.bundle.manifest.profiles["batch"].max)
    typer.echo(
        f"{right_share(drawn):.1%} of {count} held-out prompts show every attribute asked for ({steps} DDIM steps, "
        "guidance 4)"
    )
    rng = np.random.default_rng(0)
    uneven = [one for scene, image in drawn for one in unevenness(image, scene)]
    true = [one for scene, _ in drawn for one in unevenness(render(scene, rng), scene)]
    if uneven:
        typer.echo(
            f"the radius of a circle varies by {np.median(uneven):.3f} px around it (median of {len(uneven)}; true "
            f"renders {np.median(true):.3f})"
        )


if __name__ == "__main__":
    app()
