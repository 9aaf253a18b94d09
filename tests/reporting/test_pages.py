"""Image grids and the report page."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm.reporting.charts import MAX_CURVE_POINTS, log_ticks, thin, ticks
from ldm.reporting.grids import MAX_CAPTION_LINES, captioned_grid, paired_grid, wrap
from ldm.reporting.pages import Report

NASTY = """<script src="http://evil.example/x.js">alert('&')</script>"""


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def lines(self) -> list[np.ndarray]:
        found = [attrs["points"].split() for tag, attrs in self.tags if tag == "polyline"]
        return [np.array([point.split(",") for point in points], dtype=float) for points in found]


def curve(series, **options) -> Page:
    report = Report("run")
    report.curve("loss", series, "step", "loss", **options)
    return Page(report.html())


def colours(image: Image.Image) -> set[tuple[int, ...] | float | None]:
    found = image.getcolors(1 << 20)
    assert found is not None
    return {colour for _, colour in found}


# ---- grids


def test_small_images_grow_by_a_whole_factor_and_keep_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 200, (48, 48, 3), dtype=np.uint8)
    page = np.asarray(captioned_grid([Image.fromarray(pixels)], [""], cell=100))
    grown = pixels.repeat(2, axis=0).repeat(2, axis=1)
    gap = (page.shape[1] - 100) // 2
    assert np.array_equal(page[gap : gap + 96, gap : gap + 96], grown)


def test_large_images_shrink_into_the_cell_with_their_proportions():
    page = np.asarray(captioned_grid([Image.new("RGB", (600, 300), (255, 0, 0))], [""], cell=100))
    rows, columns = np.nonzero((page == (255, 0, 0)).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (100, 50)


def test_every_image_is_on_the_page_whatever_its_mode():
    images = [Image.new("RGB", (8, 8), (10 * n + 5, 90, 200)) for n in range(7)]
    shown = colours(captioned_grid(images, ["a red ring"] * 7, columns=3))
    assert {image.getpixel((0, 0)) for image in images} <= shown
    for mode in ("1", "L", "P", "RGBA", "LA", "CMYK"):
        captioned_grid([Image.new(mode, (8, 8))], ["x"])
    assert (0, 0, 0) not in colours(captioned_grid([Image.new("RGBA", (8, 8), (0, 0, 0, 0))], [""]))


def test_columns_leave_even_margins():
    one, three = (captioned_grid([Image.new("L", (8, 8))] * n, [""] * n, columns=n, cell=60) for n in (1, 3))
    gap = (three.width - one.width) // 2 - 60
    assert one.width == 60 + 2 * gap and three.width == 3 * 60 + 4 * gap


def test_captions_wrap_between_words_and_end_in_an_ellipsis_after_four_lines():
    font = ImageFont.load_default(size=14)
    short = "a small green triangle on a white background"
    lines = wrap(short, font, 160)
    assert " ".join(lines) == short and all(font.getlength(line) <= 160 for line in lines)
    long = " ".join(["word"] * 100)
    lines = wrap(long, font, 160)
    assert len(lines) == MAX_CAPTION_LINES and lines[-1].endswith("word…")
    assert all(font.getlength(line) <= 160 for line in lines)
    parts = wrap("w" * 30, font, 160)
    assert len(parts) > 1 and "".join(parts) == "w" * 30
    assert wrap("", font, 160) == [] and wrap("wide", font, 1)[0] == "w"


def test_marks_are_green_for_accepted_and_red_for_refused():
    def greenest_and_reddest(marks: list[bool | None] | None) -> tuple[bool, bool]:
        page = np.asarray(captioned_grid([Image.new("L", (8, 8))] * 2, ["a", "b"], marks=marks)).astype(int)
        return bool((page[..., 1] - page[..., 0] > 80).any()), bool((page[..., 0] - page[..., 1] > 80).any())

    assert greenest_and_reddest([True, None]) == (True, False)
    assert greenest_and_reddest([None, False]) == (False, True)
    assert greenest_and_reddest(None) == greenest_and_reddest([None, None]) == (False, False)


def test_a_grid_with_wrong_numbers_of_captions_or_marks_is_refused():
    image = Image.new("RGB", (8, 8))
    for images, captions, marks in (([], [], None), ([image], [], None), ([image], ["a"], [])):
        with pytest.raises(ValueError, match="captioned_grid needs"):
            captioned_grid(images, captions, marks=marks)
    with pytest.raises(ValueError, match="at least one row"):
        paired_grid([("original", [])])


def test_paired_rows_are_aligned():
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    page = np.asarray(paired_grid([("original", [red, red]), ("reconstruction", [blue])], cell=64))
    (red_rows, red_columns), (blue_rows, blue_columns) = (np.nonzero((page == c).all(-1)) for c in ((255, 0, 0), (0, 0, 255)))
    assert red_rows.max() < blue_rows.min() and red_columns.min() == blue_columns.min()


# ---- page


def full_report() -> Report:
    report = Report(NASTY, NASTY)
    report.metrics({NASTY: NASTY, "PSNR (dB)": 31.25, "images": 1234567, "unknown": float("nan")})
    report.table(NASTY, [NASTY, "value"], [[NASTY, 1.0]])
    report.curve(NASTY, {NASTY: ([0, 1], [1, 2])}, NASTY, NASTY)
    report.bars(NASTY, {NASTY: [1, 2]}, 0, 1, note=NASTY)
    report.image(NASTY, Image.new("RGB", (4, 4)), NASTY)
    report.commands(NASTY, [(NASTY, NASTY)])
    report.text(NASTY, [NASTY])
    return report


def test_the_page_loads_nothing_and_escapes_all_text():
    text = full_report().html()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert not re.search(r"url\(|@import", text)
    assert page.words.count(NASTY) == 22  # every text that full_report hands in
    for number in ("31.25", "1,234,567"):
        assert number in page.words
    assert "nan" not in page.words


def test_an_image_comes_back_from_the_page_as_it_went_in():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    report = Report("run")
    report.image("samples", Image.fromarray(pixels), "seed 0")
    (image,) = [attrs for tag, attrs in Page(report.html()).tags if tag == "img"]
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert image["alt"] == "samples. seed 0"


def test_save_replaces_a_page_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "report.html"
    Report("first").save(path)
    report = Report("second", "a name that is not text: \udcff")
    report.save(path)
    assert "second" in path.read_text("utf-8") and list(path.parent.iterdir()) == [path]


def test_a_row_that_does_not_fit_its_table_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 columns"):
        Report("run").table("t", ["a", "b"], [["only one"]])
    with pytest.raises(ValueError, match="'loss'"):
        curve({"loss": ([0, 1], [1.0])})


# ---- curve


def test_a_line_keeps_the_shape_of_its_data():
    for values, log_y in (([0.0, 2.0, 4.0], False), ([1e-3, 1.0, 1e3], True)):
        (line,) = curve({"loss": ([0, 5, 10], values)}, log_y=log_y).lines()
        assert np.allclose(line[:, 0], [0, 500, 1000])
        assert line[0, 1] - line[1, 1] == pytest.approx(line[1, 1] - line[2, 1], abs=0.2) and line[0, 1] > line[2, 1]


def test_a_band_lies_around_its_line_and_within_the_plot():
    series = {"other": ([0, 2], [1.0, 1.0]), "loss": ([0, 1, 2], [1.0, 2.0, 3.0])}
    page = curve(series, bands={"loss": ([0, 1, float("nan")], [2, 3, 9])})
    ((style, points),) = [(attrs["class"], attrs["points"]) for tag, attrs in page.tags if tag == "polygon"]
    band = np.array([point.split(",") for point in points.split()], dtype=float)
    line = page.lines()[1]
    assert style == "s1" and band.min() >= 0 and band.max() <= 1000
    assert band[:, 0].tolist() == [0, 500, 500, 0]  # where both ends are known, there and back
    # y grows downwards: the low end below the line, the high one above it, by as much
    assert band[:2, 1] - line[:2, 1] == pytest.approx(line[:2, 1] - band[:1:-1, 1], abs=0.2)


def test_points_that_cannot_be_drawn_are_omitted_and_counted():
    nan, inf = float("nan"), float("inf")
    page = curve({"loss": ([0, 1, 2, 3, nan], [1.0, nan, inf, 0.5, 1.0]), "late": ([], [])})
    (line,) = page.lines()
    assert len(line) == 2 and "3 not finite" in page.words and "late no data" in page.words
    page = curve({"loss": ([0, 1, 2], [1.0, 0.0, 0.1])}, log_y=True)
    assert len(page.lines()[0]) == 2 and "1 not finite or not positive" in page.words


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("values", [[], [3.0], [2.0] * 4, [0.0], [float("nan")], [1e-300, 1e299], [1e9, 1e9 + 1e-7]])
def test_any_series_makes_a_page_within_its_frame(values, log_y):
    page = curve({"loss": (range(len(values)), values)}, log_y=log_y, smooth=3)
    assert "nan" not in page.words
    for line in page.lines():
        assert np.isfinite(line).all() and line.min() >= 0 and line.max() <= 1000


def test_thinning_keeps_ends_and_spikes():
    y = np.random.default_rng(0).normal(size=100_000)
    y[77_777], y[33_333] = 50, -50
    chosen = thin(y)
    assert len(chosen) <= MAX_CURVE_POINTS and {0, 33_333, 77_777, 99_999} <= set(chosen.tolist())
    assert (np.diff(chosen) > 0).all()
    assert all(len(line) <= MAX_CURVE_POINTS for line in curve({"l": (range(100_000), y)}, smooth=50).lines())


def test_smoothing_keeps_a_constant_and_quietens_noise():
    noise = np.random.default_rng(0).normal(size=400)
    faint, mean = curve({"loss": (range(400), noise)}, smooth=25).lines()
    assert mean[:, 1].std() < 0.5 * faint[:, 1].std()
    faint, mean = curve({"loss": (range(9), [2.0] * 9)}, smooth=4).lines()
    assert np.array_equal(faint, mean)


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.9), (0, 250_000), (1e-7, 9e-7), (999.0, 1001.0), (0, 3e13)])
def test_ticks_are_few_round_evenly_spaced_and_inside(low, high):
    values = np.array([value for value, _ in ticks(low, high)])
    labels = [label for _, label in ticks(low, high)]
    assert 3 <= len(values) <= 9 and values.min() >= low - 1e-9 * abs(low) and values.max() <= high * (1 + 1e-9)
    assert np.allclose(np.diff(values), values[1] - values[0]) and len(set(labels)) == len(labels)


@pytest.mark.parametrize("low, high", [(-4, 1), (0.1, 0.2), (-0.5, 0.6), (0.3, 1.9), (-300, 299), (-1.3, 1.1)])
def test_logarithmic_ticks_name_the_value_where_they_stand(low, high):
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 10
    for at, label in found:
        assert low <= at <= high and np.log10(float(label)) == pytest.approx(at, abs=1e-6)


# ---- bars


def bars(panels, low=0, high=10, **options) -> Page:
    report = Report("latents")
    report.bars("values", panels, low, high, **options)
    return Page(report.html())


def heights(page: Page) -> list[np.ndarray]:
    """Of each panel's bars, in thousandths of the panel, from its path."""
    paths = [attrs["d"] for tag, attrs in page.tags if tag == "path"]
    assert all(path.startswith("M0 1000") and path.endswith("V1000Z") for path in paths)
    return [1000 - np.array([float(y) for y in re.findall(r"V([\d.]+)H", path)]) for path in paths]


def test_bars_are_as_high_as_their_values_on_one_scale_for_all_panels():
    page = bars({"a": [0, 1, 2, 4], "b": [8, 0]})
    first, second = heights(page)
    assert np.allclose(first, [0, 118.75, 237.5, 475], atol=0.1) and np.allclose(second, [950, 0])
    (path, _) = [attrs["d"] for tag, attrs in page.tags if tag == "path"]
    assert re.findall(r"H([\d.]+)", path) == ["250.0", "500.0", "750.0", "1000.0"]
    assert [word in page.words for word in ("a", "b", "2", "10")] == [True] * 4


def test_the_line_is_on_the_scale_of_the_bars():
    page = bars({"a": [1, 3], "b": [2, 2]}, line=[0, 4, 2])
    assert [np.allclose(line, [[0, 1000], [500, 50], [1000, 525]]) for line in page.lines()] == [True, True]
    assert np.allclose(heights(page)[0], [237.5, 712.5], atol=0.1)


@pytest.mark.parametrize("values", [[], [0], [0, 0], [float("nan"), 1], [float("inf"), -1, 1], [1e300]])
def test_any_bars_stay_within_their_frame(values):
    for found in heights(bars({"a": values})):
        assert np.isfinite(found).all() and (found >= 0).all() and (found <= 1000).all()
