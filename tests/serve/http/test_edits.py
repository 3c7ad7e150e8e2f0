"""Edits and pictures that steer, over HTTP: the pipeline's pictures, alone and in company, and files of every kind."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

import fastcache
from fastcache import Bundle
from fastcache.evaluate.quality import psnr_db
from serve.serving import GENERATE, Running

EDIT = "/v1/images/edits"
SIZE = (32, 32)


def pixels(seed: int, mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture of smooth colours, which no file format changes much."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).convert(mode)


def left_half() -> Image.Image:
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, 16, 32))
    return mask


def file(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def text(image: Image.Image) -> str:
    return base64.b64encode(file(image)).decode()


def picture(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


def edit(served: Running, image: bytes, **fields: Any) -> httpx.Response:
    files = {"image": ("a", image), **{name: ("b", fields.pop(name)) for name in ("mask",) if name in fields}}
    data = {"prompt": "ab", "num_inference_steps": 6, "seed": 4, **fields}
    return served.client.post(EDIT, data={name: str(value) for name, value in data.items()}, files=files)


def agree(found: Image.Image, wanted: Image.Image) -> bool:
    """Equal but for rounding: a picture that went through 8 bits once."""
    return float(psnr_db(*(torch.from_numpy(np.asarray(one) / 255.0) for one in (found, wanted)))) >= 45


@pytest.fixture(scope="module")
def client(tiny: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny.client.base_url}/v1", api_key="none needed here", max_retries=0)


@pytest.mark.parametrize(
    "fields", [{"strength": 0.6}, {"cache_interval": 2}, {"mask": None}, {"input_fidelity": "high"}], ids=str
)
def test_edits_are_those_of_the_pipeline(fields: dict[str, Any], tiny: Running, tiny_bundle: Bundle) -> None:
    own = {"strength": 0.5} if "input_fidelity" in fields else dict(fields)
    if "mask" in fields:
        fields, own = {"mask": file(left_half())}, {"mask_image": left_half()}
    found = picture(edit(tiny, file(pixels(0)), **fields))
    pipe = fastcache.load(tiny_bundle.path, threads=1)
    wanted = pipe("ab", image=pixels(0), num_inference_steps=6, seed=[4], **own).images[0]
    assert agree(found, wanted)
    if "mask_image" in own:
        plain = pipe("ab", image=pixels(0), num_inference_steps=6, seed=[4], strength=1.0).images[0]
        assert not agree(found, plain)


def test_an_edit_is_the_same_alone_and_in_company(tiny: Running) -> None:
    wishes: list[dict[str, Any]] = [
        {"strength": 0.7, "seed": 1},
        {"mask": file(left_half()), "seed": 2, "num_inference_steps": 9},
        {"cache_interval": 3, "seed": 3, "num_inference_steps": 12, "n": 2},
        {"guidance_scale": 1.0, "seed": 4, "num_inference_steps": 8},
    ]
    bodies = [file(pixels(k)) for k in range(len(wishes))]
    alone = [picture(edit(tiny, body, **wish)) for body, wish in zip(bodies, wishes, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(tiny.draw, num_inference_steps=20, seed=k, cache_interval=2) for k in range(4)]
        company = [pool.submit(edit, tiny, body, **wish) for body, wish in zip(bodies, wishes, strict=True)]
        assert all(agree(picture(one.result()), own) for one, own in zip(company, alone, strict=True))
        assert {other.result().status_code for other in others} == {200}


def test_json_and_forms_mean_the_same(tiny: Running) -> None:
    body = {"prompt": "ab", "num_inference_steps": 6, "seed": 4, "strength": 0.6, "image": text(pixels(0))}
    got = tiny.client.post(EDIT, json=body).json()["data"]
    assert got == edit(tiny, file(pixels(0)), strength=0.6).json()["data"]
    url = tiny.client.post(EDIT, json={**body, "image": "data:image/png;base64," + body["image"]})
    assert url.json()["data"] == got


def test_transparency_is_a_mask(tiny: Running) -> None:
    holes = pixels(0, "RGBA")
    holes.putalpha(Image.eval(left_half(), lambda value: 255 - value))
    wanted = edit(tiny, file(pixels(0)), mask=file(left_half())).json()["data"]
    assert edit(tiny, file(holes)).json()["data"] == wanted
    assert edit(tiny, file(pixels(0)), mask=file(holes)).json()["data"] == wanted
    opaque = pixels(0, "RGBA")
    assert edit(tiny, file(opaque)).json()["data"] == edit(tiny, file(pixels(0))).json()["data"]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    return file(pixels(0).rotate(90), "png", exif=exif)


@pytest.mark.parametrize(
    "body",
    [
        file(pixels(0), "webp", lossless=True),
        turned(),
        file(pixels(0).resize((64, 64), Image.Resampling.NEAREST)),
        file(Image.fromarray(np.asarray(pixels(0, "L")).astype(np.uint16) * 257)),
    ],
    ids=["webp", "exif", "large", "16 bit"],
)
def test_files_of_every_kind_are_the_picture_that_they_show(body: bytes, tiny: Running) -> None:
    is_gray = Image.open(io.BytesIO(body)).mode.startswith("I")
    wanted = picture(edit(tiny, file(pixels(0, "L" if is_gray else "RGB"))))
    assert agree(picture(edit(tiny, body)), wanted)


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "LA"])
def test_modes_are_converted(mode: str, tiny: Running) -> None:
    assert edit(tiny, file(pixels(0, mode), "jpeg" if mode == "CMYK" else "png")).status_code == 200


def bomb() -> bytes:
    """A file that says it is 60,000 pixels wide and as high."""
    body = bytearray(file(pixels(0)))
    body[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    body[29:33] = zlib.crc32(bytes(body[12:29])).to_bytes(4, "big")
    return bytes(body)


def frames() -> bytes:
    return file(pixels(0), "png", save_all=True, append_images=[pixels(1)])


@pytest.mark.parametrize(
    ("image", "fields", "param"),
    [
        (b"no picture", {}, "image"),
        (file(pixels(0))[:200], {}, "image"),
        (file(pixels(0), "bmp"), {}, "image"),
        (file(pixels(0), "gif"), {}, "image"),
        (bomb(), {}, "image"),
        (frames(), {}, "image"),
        (file(pixels(0)), {"mask": file(pixels(0, size=(16, 16)))}, "mask"),
        (file(pixels(0)), {"strength": 0}, "strength"),
        (file(pixels(0)), {"strength": "much"}, "strength"),
        (file(pixels(0)), {"strength": 0.5, "input_fidelity": "high"}, None),
        (file(pixels(0)), {"input_fidelity": "middling"}, "input_fidelity"),
        (file(pixels(0)), {"background": "transparent"}, "background"),
        (file(pixels(0)), {"control_image": text(pixels(1))}, "control_image"),
        (file(pixels(0)), {"ip_adapter_scale": 0.5}, "ip_adapter_scale"),
        (file(pixels(0)), {"quality": "high"}, "quality"),
        (file(pixels(0)), {"style": "natural"}, "style"),
        (file(pixels(0)), {"unknown": 1}, "unknown"),
        (file(pixels(0)), {"guidance_scale": 2, "true_cfg_scale": 3}, None),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_cannot_be_done_is_refused_by_name(
    image: bytes, fields: dict[str, Any], param: str | None, tiny: Running
) -> None:
    got = edit(tiny, image, **fields)
    assert got.status_code == 400
    found = got.json()["error"]
    assert found["param"] == param
    assert found["message"].count("\n") == 0


def test_addresses_are_not_fetched(tiny: Running) -> None:
    got = tiny.client.post(EDIT, json={"prompt": "a", "image": "http://127.0.0.1:1/a.png"})
    assert (got.status_code, "fetches nothing" in got.text) == (400, True)


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", BOUNDARY, 400),
        (b"--x\r\n\r\n--x--", BOUNDARY, 400),
        (b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nab', BOUNDARY, 400),
        (b"--x", {"Content-Type": "multipart/form-data"}, 400),
        (b"{", {"Content-Type": "application/json"}, 400),
        (b"[]", {"Content-Type": "application/json"}, 400),
        (b"[" * 100_000, {"Content-Type": "application/json"}, 413),
        (b'{"image":"' + b"a" * 200_000 + b'"}', {"Content-Type": "application/json"}, 400),
        (b"image=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b"a", {"Content-Type": "text/plain"}, 415),
    ],
)
def test_malformed_bodies(content: bytes, headers: dict[str, str], status: int, tiny: Running) -> None:
    padded = content if status != 413 else content + b" " * 100_000
    got = tiny.client.post(EDIT, content=padded, headers=headers)
    assert got.status_code == status
    assert got.json()["error"]["message"]


def test_a_form_may_hold_only_so_much(tiny: Running) -> None:
    many = [("image", (str(k), file(pixels(0)))) for k in range(40)]
    assert tiny.client.post(EDIT, data={"prompt": "a"}, files=many).status_code == 400
    big = tiny.client.post(EDIT, content=b"a" * (tiny.service.limits.max_upload_bytes + 1), headers=BOUNDARY)
    assert big.status_code == 413
    two = [("image[]", (str(k), file(pixels(k)))) for k in range(2)]
    got = tiny.client.post(EDIT, data={"prompt": "a"}, files=two)
    assert (got.status_code, got.json()["error"]["param"]) == (400, "image")


def test_openais_client_generates_edits_streams_and_is_told(client: openai.OpenAI, tiny: Running) -> None:
    steps: dict[str, Any] = {"num_inference_steps": 6, "seed": 4}
    drawn = client.images.generate(prompt="ab", model="tiny-model", n=2, extra_body=steps)
    assert drawn.data is not None
    assert len(drawn.data) == 2
    plain = client.images.edit(image=("a.png", file(pixels(0))), prompt="ab", extra_body={**steps, "strength": 0.6})
    assert plain.data is not None
    assert plain.data[0].b64_json == edit(tiny, file(pixels(0)), strength=0.6).json()["data"][0]["b64_json"]
    masked = client.images.edit(
        image=[("a.png", file(pixels(0)))], mask=("b.png", file(left_half())), prompt="ab", extra_body=steps
    )
    assert masked.data is not None
    streamed = client.images.edit(
        image=("a.png", file(pixels(0))), prompt="ab", stream=True, partial_images=2, extra_body=steps
    )
    assert [event.type for event in streamed] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    streamed = client.images.generate(prompt="ab", stream=True, partial_images=1, extra_body=steps)
    assert [event.type for event in streamed] == ["image_generation.partial_image", "image_generation.completed"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=("a.png", b"none"), prompt="ab")
    assert (refused.value.param, refused.value.code) == ("image", "invalid_image")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="nobody")


@pytest.fixture(scope="module")
def steered(builds: Any, tiny_model: Any) -> Iterator[tuple[Running, fastcache.FastCachePipeline]]:
    """A server of a bundle with a ControlNet, a T2I-Adapter and an IP-Adapter."""
    from serve.serving import LIMITS, running
    from tiny_controls import save_controlnet, save_ip_adapter, save_t2i_adapter

    def save(folder: Any) -> None:
        save_controlnet(folder / "controlnet", tiny_model)
        save_t2i_adapter(folder / "t2i")
        save_ip_adapter(folder / "ip", tiny_model)

    folder = builds.model("tiny-controls", save)
    parts = {"controlnet": "controlnet", "t2i_adapter": "t2i", "ip_adapter": "ip/ip-adapter.safetensors"}
    bundle = builds.bundle(tiny_model, branch_id=(0, 2), **{kind: str(folder / at) for kind, at in parts.items()})
    with running(bundle.path, limits=LIMITS) as served:
        yield served, fastcache.load(bundle.path, threads=1)


@pytest.mark.slow
def test_pictures_that_steer_are_the_pipelines_alone_and_in_company(
    steered: tuple[Running, fastcache.FastCachePipeline],
) -> None:
    served, pipe = steered
    wishes: list[dict[str, Any]] = [
        {"controlnet_conditioning_scale": 0.5},
        {"control_guidance_start": 0.2, "control_guidance_end": 0.7, "cache_interval": 3},
        {"ip_adapter_scale": 0.3, "adapter_conditioning_scale": 0.4, "guidance_scale": 1.0},
        {"cache_interval": 2},
    ]
    names = ("control_image", "adapter_image", "ip_adapter_image")
    shown = [{name: pixels(10 * k + j) for j, name in enumerate(names)} for k in range(len(wishes))]
    common = {"prompt": "ab", "num_inference_steps": 8}

    def ask(k: int) -> httpx.Response:
        pictures = {name: text(image) for name, image in shown[k].items()}
        if k % 2:
            return served.client.post(
                EDIT, json={**common, **wishes[k], **pictures, "image": text(pixels(k)), "seed": k}
            )
        return served.client.post(GENERATE, json={**common, **wishes[k], **pictures, "seed": k})

    alone = [picture(ask(k)) for k in range(len(wishes))]
    for k, wish in enumerate(wishes):
        begun = {"image": pixels(k)} if k % 2 else {}
        assert agree(alone[k], pipe(**common, **wish, **shown[k], **begun, seed=[k]).images[0])
    assert not agree(alone[0], alone[2])
    with ThreadPoolExecutor(4) as pool:
        company = list(pool.map(ask, range(len(wishes))))
    assert all(agree(picture(one), own) for one, own in zip(company, alone, strict=True))
    missing = served.client.post(GENERATE, json=common)
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "control_image")
    extra = {"image": [text(pixels(0)), text(pixels(12))], "control_image": text(pixels(10))}
    both = served.client.post(EDIT, json={**common, **extra, "adapter_image": text(pixels(11)), "seed": 0})
    assert both.status_code == 200
    assert json.loads(both.text)["plan"]["name"] == "uncached"
