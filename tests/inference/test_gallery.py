"""The page shows every image with its settings, is made of escaped text, and asks for nothing but the files beside it."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from PIL import Image

from ldm.errors import UsageError
from ldm.inference.gallery import write_gallery
from ldm.inference.metadata import Provenance, save_png
from ldm.inference.settings import GenerationSettings
from ldm.reporting.pages import render

PROVENANCE = Provenance(
    "a model", "0123456789abcdef" * 4, "ddim", "DDIMScheduler", "float32", "cpu (any)", "0.1.0", "2.13.0", "0.42.1"
)
NASTY = """</p></template><script src="http://evil.example/x.js">alert('&')</script><img src=x onerror="alert(1)">"""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Page(HTMLParser):
    """Tags and text of a page; fails on tags that do not close in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [text for where, text in self.texts if where == tag]


def add(folder, name, prompt="a red ring", **settings):
    save_png(Image.new("RGB", (40, 24), "red"), folder / name, GenerationSettings(prompt, **settings), PROVENANCE)


def page(folder):
    return Page(write_gallery(folder).read_text(encoding="utf-8"))


def test_every_image_is_shown_with_its_settings(tmp_path):
    given = {"guidance_rule": "apg", "guidance_interval": (0.1, 1.0), "negative": "blur", "eta": 0.25, "scheduler": "ddim"}
    add(tmp_path, "0001-b.png", "a blue star", seed=5, **given)
    add(tmp_path, "0000-a.png")
    found = page(tmp_path)
    images = [attributes for tag, attributes in found.tags if tag == "img" and "src" in attributes]
    assert [(image["src"], image["alt"]) for image in images] == [("0000-a.png", "a red ring"), ("0001-b.png", "a blue star")]
    assert {(image["loading"], image["width"], image["height"]) for image in images} == {("lazy", "40", "24")}
    settings = dict(zip(found.of("dt"), found.of("dd"), strict=True))
    assert settings["guidance interval"] == "0.1 to 1"
    assert settings["seed"] == "5" and settings["guidance rule"] == "apg" and settings["negative"] == "blur"
    assert settings["size"] == "40 × 24" and settings["scheduler"] == "ddim (DDIMScheduler)" and settings["eta"] == "0.25"
    assert settings["model hash"] == PROVENANCE.model_hash and "torch 2.13.0" in settings["versions"]
    assert "2 images of a model (0123456789)" in found.of("p")
    assert found.of("pre")[1] == "ldm sample 'a model' --from-image 0001-b.png --out again"


def test_prompts_and_names_are_text_and_nothing_else(tmp_path):
    add(tmp_path, "0.png", negative="blur")
    plain = [tag for tag, _ in page(tmp_path).tags]
    (tmp_path / "0.png").unlink()
    name = "javascript:a #?%\"'<b>&$(x).png"
    add(tmp_path, name, NASTY, negative=NASTY)
    found = page(tmp_path)
    assert [tag for tag, _ in found.tags] == plain and not any("onerror" in attributes for _, attributes in found.tags)
    assert NASTY in found.of("p") and NASTY in found.of("dd")
    (link, *_) = [attributes["href"] for tag, attributes in found.tags if "href" in attributes]
    assert unquote(link) == name and not re.search(r"[:#?'\"<&]", link)
    assert "'javascript:a #?%\"'\"'\"'<b>&$(x).png'" in found.of("pre")[0]  # one word to a shell


def test_the_page_leaves_for_nowhere(tmp_path):
    add(tmp_path, "0.png")
    text = write_gallery(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|@import|url\(", text.replace(script := render("gallery.js"), ""))
    (run,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(run.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text  # else the browser refuses the page's own script
    assert "http" not in script and "innerHTML" not in script and "default-src 'none'" in text


def test_what_is_not_of_a_run_is_left_out_and_what_is_broken_is_named(tmp_path):
    add(tmp_path, "0.png")
    for name in ("grid.png", "preview.png", "note.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    Image.new("RGB", (300, 200)).save(tmp_path / "other.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    found = page(tmp_path)
    assert [attributes["src"] for tag, attributes in found.tags if "loading" in attributes] == [
        "0.png",
        "cut.png",
        "other.png",
        "text.png",
    ]
    notes = found.of("p")
    for beginning, count in (("holds no settings of ldm", 1), ("is not a whole PNG", 2)):
        assert sum(note.startswith(beginning) for note in notes) == count
    assert not any(str(tmp_path) in note for note in notes)
    assert len(found.of("pre")) == 1


def test_an_empty_folder_and_none(tmp_path):
    assert "0 images" in page(tmp_path).of("p")
    with pytest.raises(UsageError, match="not a folder"):
        write_gallery(tmp_path / "none")
