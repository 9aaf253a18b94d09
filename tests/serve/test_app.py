"""The server as a client sees it: what it generates, what it refuses, and that no request makes it fail."""

import asyncio
import base64
import io
import json
import re
import secrets
import shutil
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import pytest
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.testclient import TestClient

from ldm.cli import main
from ldm.errors import LdmError, UsageError
from ldm.inference.generate import ImageGenerator
from ldm.inference.inputs import reference
from ldm.inference.metadata import read_png
from ldm.inference.recommended import recommend
from ldm.inference.settings import GenerationSettings
from ldm.pipeline import LatentDiffusionPipeline, load_pipeline
from ldm.serve import Limits
from ldm.serve.app import Access, create_app, follow, read_body
from ldm.serve.request import MAX_SEED, GenerationRequest, parse_request
from ldm.serve.worker import JobProgress, StoredImage, Worker

RED = {"prompt": "a red circle", "seed": 3, "steps": 2}


class GatedWorker(Worker):
    """Finishes an image when its gate is opened."""

    def __init__(self, worker):
        vars(self).update(vars(worker))
        self.generating, self.gate = threading.Event(), threading.Event()

    def generate(self, request, report):
        self.generating.set()
        while not self.gate.wait(0.005):
            report(JobProgress(0, 1, ""))
        return StoredImage(secrets.token_hex(8), request.settings, b"", None, 0.0)


@pytest.fixture
def limits():
    return Limits(steps=20, pixels=64 * 64, body=200_000, upload_pixels=300 * 300, images=5, body_seconds=1)


@pytest.fixture
def client(worker, queue, limits):
    with TestClient(create_app(worker, queue, limits), base_url="http://localhost:7860") as made:
        yield made


def post(client, content, **headers):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return client.post("/generate", content=data, headers={"content-type": "application/json"} | headers)


def generated(client, start=None, **changes):
    """Of a request: the image in its last line, the image's bytes, and all lines."""
    response = post(client, {"settings": RED | changes} | ({} if start is None else {"start": start}))
    assert response.status_code == 200, response.text
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines[-1]["state"] == "done", lines[-1]
    image = lines[-1]["image"]
    png = client.get(f"/images/{image['id']}/image.png")
    assert png.status_code == 200 and png.headers["content-type"] == "image/png"
    return image, png.content, lines


def refused(response, status, line):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert line in error and "\n" not in error and len(error) <= 301
    return response


def encoded(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


# ---------------------------------------------------------------------------------------------- generation


def test_the_page_is_told_the_sizes_trained_on(client):
    told = client.get("/model").json()
    assert told["classes"] is None and told["recommended"] == {}
    assert [told["width"], told["height"]] == told["sizes"][0] == [16, 16] and told["sizes"][1:] == [[32, 16]]


def test_an_image_is_that_of_ldm_sample_and_carries_its_settings(client, worker, tmp_path):
    image, png, lines = generated(client, negative="a star", guidance=2.5, scheduler="heun", guidance_rule="apg", width=32)
    chosen = GenerationSettings.from_json(image["settings"], "answer")
    assert (chosen.seed, chosen.guidance, chosen.scheduler, chosen.width) == (3, 2.5, "heun", 32)
    ((_, _, expected, _),) = ImageGenerator(LatentDiffusionPipeline(**worker.pipeline.components)).generate([chosen])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(expected))
    (tmp_path / "image.png").write_bytes(png)
    settings_inside, provenance = read_png(tmp_path / "image.png")
    assert settings_inside == chosen and provenance.model == "tiny" and provenance.scheduler == "heun"
    previews = [line["preview"] for line in lines if "preview" in line]
    assert all(preview.startswith("data:image/jpeg;base64,") for preview in previews)


def test_an_image_has_the_adapters_that_it_asks_for(client, worker, model_path, adapter_path, tmp_path):
    (offered,) = client.get("/model").json()["adapters"]
    assert (offered["name"], offered["weight"], offered["trigger_words"]) == ("dog", 0.5, ["sks dog"])
    plain, used = generated(client)[1], f"{offered['reference']}=0.75"
    image, adapted, _ = generated(client, lora=[used])
    assert adapted != plain and image["settings"]["lora"] == [used] and generated(client)[1] == plain
    without = generated(client, lora=[f"{offered['reference']}=0"])[1]
    assert Image.open(io.BytesIO(without)).tobytes() == Image.open(io.BytesIO(plain)).tobytes()
    (tmp_path / "image.png").write_bytes(adapted)
    again = ["--from-image", str(tmp_path / "image.png"), "--lora", str(adapter_path), "--device", "cpu"]
    main(["sample", str(model_path), *again, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "0000-a-red-circle.png").read_bytes() == adapted
    for wrong in ([str(adapter_path)], [used, used], ["sha256:" + "0" * 64], [f"{offered['reference']}=nan"]):
        assert "lora" in refused(post(client, {"settings": RED | {"lora": wrong}}), 422, "give a").json()["error"]
    with pytest.raises(UsageError, match="twice"):
        Worker(worker.pipeline, model_path, [str(adapter_path), f"{adapter_path}=2"])


def test_recommended_settings_are_the_defaults_of_page_and_requests(model_path, queue, limits, tmp_path):
    copy = Path(shutil.copytree(model_path, tmp_path / "tiny"))
    settings = {"scheduler": "unipc", "steps": 2, "guidance": 1.5}
    recommend(load_pipeline(copy), copy, **settings)
    with TestClient(create_app(Worker(load_pipeline(copy), copy), queue, limits), base_url="http://localhost") as client:
        assert client.get("/model").json()["recommended"] == settings
        for given in ({}, {"scheduler": None, "guidance": 2.0}, {"scheduler": "heun", "steps": 1}):
            wanted = settings | {name: value for name, value in given.items() if value is not None}
            image = json.loads(post(client, {"settings": {"prompt": "ring"} | given}).text.splitlines()[-1])["image"]
            assert image["settings"].items() >= wanted.items()


def test_class_models_take_a_class_and_unconditional_ones_no_prompt(worker_of, queue, limits):
    for classes, ok, wrong in (
        (["ring", "star fish", "cat"], {"prompt": "star fish", "negative": "cat"}, {"prompt": "dog"}),
        ([], {}, {"prompt": "ring"}),
    ):
        with TestClient(create_app(worker_of(*classes), queue, limits), base_url="http://localhost") as client:
            assert client.get("/model").json()["classes"] == classes
            image = json.loads(post(client, {"settings": ok | {"steps": 1}}).text.splitlines()[-1])["image"]
            assert image["settings"]["prompt"] == ok.get("prompt", "")
            line = f"'dog' is no class that is known; give one of: {', '.join(classes)}" if classes else "leave it empty"
            refused(post(client, {"settings": wrong | {"steps": 1}}), 422, line)
            refused(post(client, {"settings": ok | {"steps": 1, "negative": wrong["prompt"]}}), 422, line)
            if classes:
                refused(
                    post(client, {"settings": {"steps": 1}}), 422, "the prompt is empty; give a class: ring, star fish, cat"
                )


def test_progress_shows_previews_of_the_image(worker):
    seen = []
    worker.generate(parse_request(json.dumps({"settings": RED | {"steps": 8}}).encode(), Limits(), worker.size), seen.append)
    assert [(progress.step, progress.steps) for progress in seen] == [(step, 8) for step in range(1, 9)]
    assert len({progress.preview for progress in seen}) == 8
    shown = Image.open(io.BytesIO(base64.b64decode(seen[-1].preview.split(",")[1])))
    assert shown.format == "JPEG" and shown.size == (16, 16)


def test_the_gallery_holds_the_latest(client):
    ids = [generated(client, seed=seed)[0]["id"] for seed in range(7)]
    listed = client.get("/images").json()
    assert [image["id"] for image in listed] == ids[2:]
    assert [image["settings"]["seed"] for image in listed] == [2, 3, 4, 5, 6]
    refused(client.get(f"/images/{ids[0]}/image.png"), 404, "not among the last 5")


def test_an_image_starts_from_the_one_sent_and_can_be_generated_again_from_it(client, noise):
    image, png, _ = generated(client, encoded(noise), strength=0.5, width=32, height=16)
    start = client.get(f"/images/{image['id']}/start.png").content
    assert image["started"] and image["settings"]["image"] == reference(start)
    assert Image.open(io.BytesIO(start)).size == Image.open(io.BytesIO(png)).size == (32, 16)
    again, png_again, _ = generated(client, base64.b64encode(start).decode(), strength=0.5, width=32, height=16)
    assert png_again == png and again["settings"] == image["settings"]
    assert generated(client, strength=None, width=32, height=16)[1] != png
    other, _, _ = generated(client)
    refused(client.get(f"/images/{other['id']}/start.png"), 404, "did not start from another one")


def test_of_a_transparent_start_the_hole_alone_is_generated(client, noise):
    start = noise.convert("RGBA").resize((32, 32))
    start.paste((0, 0, 0, 0), (0, 0, 16, 32))
    image, png, _ = generated(client, encoded(start), width=32, height=32)
    found, given = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int) for data in (png, base64.b64decode(encoded(start)))
    )
    band = 16 + 4  # pixels of one latent beside the hole are blended
    assert np.array_equal(found[:, band:], given[:, band:]) and not np.array_equal(found[:, :16], given[:, :16])
    kept = Image.open(io.BytesIO(client.get(f"/images/{image['id']}/start.png").content))
    assert kept.mode == "RGBA" and np.array_equal(np.asarray(kept.getchannel("A")), np.asarray(start.getchannel("A")))


def test_thin_transparent_lines_stay_and_a_hole_that_is_cropped_off_is_refused():
    def start(hole, width):
        image = Image.new("RGBA", (400, 100), "red")
        image.paste((0, 0, 0, 0), hole)
        body = {"settings": {"prompt": "x", "width": width, "height": 16}, "start": encoded(image)}
        found = parse_request(json.dumps(body).encode(), Limits(), (16, 16)).start
        assert found is not None
        again = {"settings": body["settings"], "start": encoded(found)}
        assert parse_request(json.dumps(again).encode(), Limits(), (16, 16)).start == found
        return np.asarray(found.getchannel("A"))

    alpha = start((200, 0, 201, 100), 16)
    assert (alpha == 0).any(axis=1).all() and (alpha == 0).sum() <= 2 * 16
    with pytest.raises(UsageError, match="cropped off at 16x16"):
        start((0, 0, 10, 100), 16)


KINDS = {"PNG": ["RGB", "L", "P", "RGBA", "1", "I;16"], "JPEG": ["RGB", "L", "CMYK"], "WEBP": ["RGB", "RGBA"]}


@pytest.mark.parametrize("file_format, mode", [(name, mode) for name, modes in KINDS.items() for mode in modes])
def test_images_to_start_from_come_in_the_common_kinds(noise, file_format, mode):
    body = {"settings": {"prompt": "x"}, "start": encoded(noise.convert(mode), file_format)}
    request = parse_request(json.dumps(body).encode(), Limits(), (16, 16))
    assert request.start is not None
    assert (request.start.mode, request.start.size) == ("RGB", (16, 16)) and request.settings.width == 16


# ---------------------------------------------------------------------------------------------- limits

TOO_MUCH = {
    "prompt has 1001 characters; the limit of this server is 1000": {"prompt": "x" * 1001},
    "negative has 1001 characters": {"negative": "x" * 1001},
    "steps is 21; the limit of this server is 20": {"steps": 21},
    "steps is 0": {"steps": 0},
    f"the limit of this server is {MAX_SEED}": {"seed": MAX_SEED + 1},
    "seed is -1": {"seed": -1},
    "an image of 68x64 has more pixels": {"width": 68, "height": 64},
    "18": {"width": 18},
    "no sampler 'ddim'": {"scheduler": "ddim"},
    "no sampler 'nonsense'": {"scheduler": "nonsense"},
    "guidance is 'much'": {"guidance": "much"},
    "guidance is a number of 1326 bits": {"guidance": 10**399},
    "the prompt is empty": {"prompt": " "},
    "prompt is None": {"prompt": None},
    "there is no setting 'colour'": {"colour": "red"},
    "strength is of a given image": {"strength": 0.5},
    "image would name a file of the server": {"image": "/etc/passwd"},
    "mask would name a file of the server": {"mask": "../../etc/passwd"},
    "weak would name a file of the server": {"weak": "/"},
    "half a surrogate pair": {"prompt": "\ud800"},
}


@pytest.mark.parametrize("line", TOO_MUCH)
def test_settings_beyond_the_limits_are_refused_in_one_line(client, line):
    refused(post(client, {"settings": RED | TOO_MUCH[line]}), 422, line)


def test_a_size_far_from_those_trained_on_is_named_once(worker, caplog):
    settings = RED | {"steps": 1, "width": 44, "height": 8}
    request = parse_request(json.dumps({"settings": settings}).encode(), Limits(), worker.size)
    worker.check(request.settings)
    worker.generate(request, lambda _: None)
    assert [record.getMessage()[:4] for record in caplog.records] == ["44x8"]


def test_a_prompt_longer_than_the_text_encoder_takes_is_refused(worker):
    with pytest.raises(UsageError, match="tokens, the text encoder takes"):
        worker.check(GenerationSettings("circle " * 600))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"settings": {"prompt": "x", "seed": NaN}}',
        b'{"settings": {"prompt": "x", "guidance": 1e999}}',
        b'{"settings": {"prompt": "x", "seed": ' + b"9" * 5000 + b"}}",
        b'{"settings": {"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
        b'{"settings": {"\\ud800": 1, "prompt": "x"}}',
        b'{"settings": {"prompt": "x"}, "path": "/etc/passwd"}',
        b'{"settings": {"prompt": "x"}, "start": 7}',
    ],
)
def test_invalid_bodies_are_refused_in_one_line(client, body):
    refused(post(client, body), 422, "")


def test_other_content_types_and_long_bodies_are_refused(client, limits):
    refused(client.post("/generate", data={"prompt": "x"}), 415, "send JSON")
    refused(post(client, b" " * (limits.body + 1)), 413, "more than 200000 bytes")

    def chunks():  # of no announced length
        for _ in range(300):
            yield b" " * 1000

    refused(post(client, b""), 422, "not valid JSON")
    headers = {"content-type": "application/json"}
    refused(client.post("/generate", content=chunks(), headers=headers), 413, "more than 200000 bytes")
    for announced in ("200001", "9" * 5000, "x", "-1"):
        refused(post(client, b"{}", **{"content-length": announced}), 413, "more than 200000 bytes")


class BrokenRequest:
    """A request whose body does not arrive completely."""

    headers = MappingProxyType({})

    def __init__(self, ends):
        self.ends = ends

    async def stream(self):
        yield b"{"
        if self.ends:
            raise ClientDisconnect
        await asyncio.sleep(60)


def test_a_request_that_does_not_arrive_is_refused():
    for ends, status in ((True, 400), (False, 408)):
        with pytest.raises(HTTPException) as error:
            asyncio.run(read_body(cast(Request, BrokenRequest(ends)), Limits(body_seconds=0.05)))
        assert error.value.status_code == status


def bomb(width, height):
    """A small PNG with a large size in its header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_uploads_that_are_not_images_are_refused(client, noise):
    gif, whole = encoded(noise, "GIF"), base64.b64decode(encoded(noise))
    b64 = base64.b64encode
    for start, line in {
        "not base64!": "not base64",
        "é": "not base64",
        "": "cannot be read as an image",
        gif: "send a PNG, JPEG or WebP",
        b64(whole[: len(whole) // 2]).decode(): "cannot be read as an image",
        b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(): "cannot be read as an image",
        b64(bomb(50_000, 50_000)).decode(): "more pixels than the limit of",
        b64(bomb(301, 300)).decode(): "more pixels than the limit of this server, 90000",
        b64(bomb(300, 300)).decode(): "cannot be read as an image",
        b64(bomb(0, 0)).decode(): "cannot be read as an image",
    }.items():
        refused(post(client, {"settings": RED, "start": start}), 422, line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from([*GenerationSettings.__dataclass_fields__, "start", "settings", "count"])
NEAR = st.sampled_from(["a red ring", "apg", "euler", "unipc", 0, 1, -1, 4, 8, 16, 0.5, [0.2, 0.8], [0, 0], 2**63])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, NEAR | JSON, max_size=4), st.dictionaries(st.sampled_from(["start", "x"]), JSON, max_size=1))
def test_any_json_gives_an_image_or_one_line(client, changes, beside):
    """One step each, so that valid settings take little time."""
    response = post(client, {"settings": {"prompt": "a ring"} | changes | {"steps": 1}} | beside)
    if response.status_code == 200:
        assert json.loads(response.text.splitlines()[-1])["state"] in ("done", "failed")
        assert "a bug in ldm" not in response.text
    else:
        refused(response, 422, "")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON | st.binary(max_size=60))
def test_any_body_is_refused_in_one_line(client, content):
    refused(post(client, content), 422, "")


# ---------------------------------------------------------------------------------------------- access


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/images/..%2f..%2fetc%2fpasswd/image.png",
        "/images/%2e%2e/image.png",
        "/images/%00/image.png",
        "/images//etc/passwd",
        "/page.html",
        "/app.py",
        "/static/page.js",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/file=/etc/passwd",
        "/images/" + "x" * 3000 + "/image.png",
    ],
)
def test_no_file_of_the_machine_is_reachable(client, path):
    response = client.get(path)
    assert response.status_code == 404 and "root:" not in response.text


def test_other_methods_are_refused(client):
    for method, path in (("GET", "/generate"), ("POST", "/"), ("DELETE", "/images"), ("PUT", "/model"), ("TRACE", "/")):
        refused(client.request(method, path), 405, "")


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:7860", "localhost.evil.example", "", "[", "a b", "1.2.3.4.evil", "1.2.3.4:80:80"),
        # a parser of URLs finds an address in these
        *("evil.example@127.0.0.1", "127.0.0.1#@evil.example", "127.0.0.1/evil", "127.0.0.1?evil", "[::1]@evil", "[127.0.0.1]"),
    ],
)
def test_unknown_host_names_are_refused(client, host):
    refused(client.get("/model", headers={"host": host}), 421, "unknown host name")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:7860", "[::1]:7860", "192.168.1.5:7860"])
def test_own_host_names_and_addresses_are_accepted(client, host):
    assert client.get("/model", headers={"host": host}).status_code == 200


def test_a_request_of_two_hosts_is_refused(client):
    refused(client.get("/model", headers=[("host", "localhost"), ("host", "evil.example")]), 421, "unknown host name")


def test_other_host_names_and_the_origin_of_a_proxy_can_be_allowed(worker, queue, limits):
    access = Access(["Images.example.org"], ["https://draw.example.org"])
    with TestClient(create_app(worker, queue, limits, access), base_url="http://localhost:7860") as client:
        for host in ("images.example.org", "IMAGES.example.org:443", "draw.example.org", "localhost"):
            assert client.get("/model", headers={"host": host}).status_code == 200
        refused(client.get("/model", headers={"host": "evil.images.example.org"}), 421, "--allow-host NAME")
        for host, origin in (
            ("images.example.org", "https://images.example.org"),
            ("localhost:7860", "https://draw.example.org"),
        ):
            assert post(client, {"settings": RED}, host=host, origin=origin).status_code == 200
        refused(post(client, {"settings": RED}, origin="http://draw.example.org"), 403, "comes from another site")


@pytest.mark.parametrize(
    ("hosts", "origins", "line"),
    [
        (["a.example:80"], [], "'a.example:80' is not a host name"),
        (["http://a.example"], [], "is not a host name"),
        (["*"], [], "is not a host name"),
        ([], ["a.example"], "is not an origin"),
        ([], ["ftp://a.example"], "is not an origin"),
        ([], ["https://a.example/page"], "is not an origin"),
    ],
)
def test_what_is_no_host_name_or_origin_is_refused(hosts, origins, line):
    with pytest.raises(UsageError, match=re.escape(line)):
        Access(hosts, origins)


def test_other_sites_cannot_generate(client):
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:8000"},
        {"origin": "http://[", "host": "localhost:7860"},
        {"origin": "ftp://localhost:7860"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        refused(post(client, {"settings": RED}, **headers), 403, "comes from another site")
    ours = {"origin": "http://localhost:7860", "sec-fetch-site": "same-origin"}
    assert post(client, {"settings": RED}, **ours).status_code == 200


def test_every_answer_forbids_the_page_to_leave_its_origin(client):
    for response in (client.get("/"), client.get("/nothing"), client.get("/model", headers={"host": "evil.example"})):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/page.css", "/page.js"):
        text = client.get(path).text
        assert "http:" not in text and "https:" not in text and "style=" not in text and "innerHTML" not in text


# ---------------------------------------------------------------------------------------------- many requests


def test_of_64_requests_one_runs_16_wait_and_the_rest_are_told_to_try_again(worker, queue, soon):
    gated = GatedWorker(worker)
    with (
        TestClient(create_app(gated, queue, Limits()), base_url="http://localhost") as client,
        ThreadPoolExecutor(64) as clients,
    ):
        answers = [clients.submit(post, client, {"settings": RED | {"seed": seed}}) for seed in range(64)]
        soon(lambda: sum(answer.done() for answer in answers) == 64 - 17)
        told = [answer.result() for answer in answers if answer.done()]
        for response in told:
            refused(response, 429, "16 images are waiting already; try again in")
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/").status_code == 200  # the others still can look
        gated.gate.set()
        held = [answer.result() for answer in answers if answer.result().status_code == 200]
        assert len(held) == 17
        assert [json.loads(response.text.splitlines()[-1])["state"] for response in held] == ["done"] * 17
        assert any('"ahead": 16' in response.text for response in held)
        assert len(client.get("/images").json()) == 17


def test_more_simultaneous_requests_than_the_limit_are_told_to_try_again(worker, queue, soon):
    gated = GatedWorker(worker)
    app = create_app(gated, queue, Limits(requests=3))
    with TestClient(app, base_url="http://localhost") as client, ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(post, client, {"settings": RED}) for _ in range(3)]
        soon(lambda: app.active == 3)
        response = refused(client.get("/model"), 503, "3 requests are being answered already")
        assert int(response.headers["retry-after"]) >= 1
        gated.gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
        assert app.active == 0 and client.get("/model").status_code == 200


class Listener:
    """A request whose client stays connected until ``gone``."""

    gone = False

    async def is_disconnected(self):
        return self.gone


def test_a_job_continues_without_its_client_and_can_be_cancelled(worker, queue, soon):
    gated, listener = GatedWorker(worker), Listener()
    with (
        TestClient(create_app(gated, queue, Limits()), base_url="http://localhost") as client,
        ThreadPoolExecutor(2) as clients,
    ):
        answers = [clients.submit(post, client, {"settings": RED | {"seed": seed}}) for seed in range(2)]
        soon(lambda: len(client.get("/jobs").json()) == 2)
        first, second = client.get("/jobs").json()
        assert (first["state"], second["state"], second["ahead"]) == ("working", "waiting", 1)
        assert {first["settings"]["seed"], second["settings"]["seed"]} == {0, 1}
        assert client.delete(f"/jobs/{second['id']}").status_code == 200
        refused(client.delete(f"/jobs/{first['id']}", headers={"origin": "http://evil.example"}), 403, "another site")
        assert [job["id"] for job in client.get("/jobs").json()] == [first["id"]]
        gated.gate.set()
        soon(lambda: client.get("/jobs").json()[0]["state"] == "done")
        assert client.get("/images").json() == [client.get("/jobs").json()[0]["image"]]
        ends = {json.loads(answer.result().text.splitlines()[-1])["state"] for answer in answers}
        assert ends == {"done", "cancelled"}
        assert {answer.result().headers["location"] for answer in answers} == {f"/jobs/{job['id']}" for job in (first, second)}

    gated.gate.clear()
    job = queue.submit(lambda job: gated.generate(GenerationRequest(GenerationSettings("x")), job.report))

    async def leave():
        lines = follow(cast(Request, listener), queue, job)
        assert json.loads(await anext(lines))["state"] in ("waiting", "working")
        await lines.aclose()  # the connection is closed while an answer is being sent
        listener.gone = True
        assert len([line async for line in follow(cast(Request, listener), queue, job)]) == 1

    asyncio.run(leave())
    assert not job.ended
    gated.gate.set()
    soon(lambda: job.state == "done")


def test_of_the_jobs_that_have_ended_the_latest_are_listed(client):
    for seed in range(20):
        generated(client, seed=seed)
    assert [job["settings"]["seed"] for job in client.get("/jobs").json()] == [15, 16, 17, 18, 19]  # images=5


def test_a_failed_generation_is_reported_in_one_line(worker, queue):
    class Broken(GatedWorker):
        def generate(self, request, report):
            raise LdmError("the denoiser's answer is not finite\n at step 1")

    with TestClient(create_app(Broken(worker), queue, Limits()), base_url="http://localhost") as client:
        last = json.loads(post(client, {"settings": RED}).text.splitlines()[-1])
        assert last == {"state": "failed", "error": "the denoiser's answer is not finite at step 1"}


def test_a_stopping_server_refuses_requests(client, queue):
    queue.close()
    assert refused(post(client, {"settings": RED}), 503, "ldm serve is stopping").headers["retry-after"]


@pytest.mark.parametrize("name", ["steps", "pixels", "waiting", "requests", "images", "prompt"])
def test_limits_of_zero_are_refused(name):
    with pytest.raises(UsageError, match=f"the limit on {name} is 0; give 1 or more"):
        Limits(**{name: 0})
