"""The HTML generator: what it writes is parsed again by the standard library's parser."""

import numpy as np
import pytest
from helpers.html import Reader
from matplotlib.figure import Figure
from PIL import Image

from diffusion_lit.report import Page
from diffusion_lit.report.images import gif_bytes
from diffusion_lit.report.receipt_page import attributed

NASTY = "<script>alert('a & b')</script> \"quoted\" é \ud800 \x00 </style>"


def curve():
    figure = Figure(figsize=(4, 3))
    figure.subplots().plot([1, 2, 3])
    return figure


def test_all_text_comes_back_as_it_was_and_opens_no_tag():
    page = Page(NASTY, NASTY)
    for write in (page.heading, page.text, page.command):
        write(NASTY)
    page.heading(NASTY, level=3)
    page.heading("Second")
    page.heading("Third")
    page.listing(NASTY + "\nline 2", NASTY)
    page.link(NASTY.replace("/", ""), "studies/a b#c/index.html")
    page.table([NASTY], [[NASTY]], caption=NASTY)
    page.image(curve(), NASTY)
    read = Reader(page.html())
    kept = NASTY.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    # title, h1, subtitle, nav, heading, text, command, h3, listing, its summary, caption, header, cell, caption
    assert read.text.count(kept) == 14
    assert read.all("img")[0]["alt"] == kept
    assert not read.all("script")
    assert len(read.all("style")) == 1
    page.html().encode("utf-8")
    links = [attributes["href"] for attributes in read.all("a")]
    assert links == ["#section-1", "#section-2", "#section-3", "studies/a%20b%23c/index.html"]
    assert [title["id"] for title in read.all("h2")] == ["section-1", "section-2", "section-3"]


def test_images_of_every_kind_are_held_by_the_page_itself(tmp_path):
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
    grey.save(tmp_path / "tiny.png")
    frames = [Image.fromarray(rng.integers(0, 256, (300, 250), dtype=np.uint8)) for _ in range(3)]
    (tmp_path / "moving.gif").write_bytes(gif_bytes(frames))
    page = Page("Images")
    page.images([(tmp_path / "tiny.png", ""), (str(tmp_path / "moving.gif"), "moves"), (grey, "tiny")])
    page.image(curve(), "a curve")
    images = list(Reader(page.html()).images())
    assert [image.format for _, image in images] == ["PNG", "GIF", "PNG", "PNG"]
    assert [attributes["alt"] for attributes, _ in images] == ["tiny.png", "moves", "tiny", "a curve"]
    assert [attributes.get("class") for attributes, _ in images] == ["pixels", None, "pixels", None]
    sizes = [(int(attributes["width"]), int(attributes["height"])) for attributes, _ in images]
    assert sizes == [(256, 256), (250, 300), (256, 256), (384, 288)]  # 8 x 32; as it is; 4 by 3 inches of 96 pixels
    assert images[1][1].n_frames == 3
    assert np.array_equal(np.asarray(images[0][1]), np.asarray(grey))


def test_a_image_that_is_missing_or_damaged_is_a_sentence(tmp_path):
    Image.new("RGB", (300, 300), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.gif").touch()
    page = Page("Lost")
    page.image(tmp_path / "gone<b>.png", "a caption")
    page.images([(tmp_path / name, "") for name in ("cut.png", "text.png", "empty.gif")])
    read = Reader(page.html())
    assert not read.all("img")
    assert "The image gone<b>.png is missing." in read.text
    assert "a caption" in read.text
    for name in ("cut.png", "text.png", "empty.gif"):
        assert f"The image {name} cannot be read as an image." in read.text


def test_tables_show_numbers_for_reading_and_refuse_ragged_rows():
    page = Page("Table")
    page.table(["what", "count", "value"], [["a", 1234567, 0.123456], [None, True, float("nan")]])
    read = Reader(page.html())
    assert "1,234,567" in read.text
    assert "0.1235" in read.text
    assert "True" in read.text
    assert [cell.get("class") for cell in read.all("td")] == [
        *["short", "number short", "number short"],
        *["short", "short", "number short"],
    ]
    assert [title.get("class") for title in read.all("th")] == ["short", "number short", "number short"]
    with pytest.raises(ValueError, match=r"has 1 cells, but the table has 2 columns"):
        page.table(["a", "b"], [["one"]])


@pytest.mark.parametrize("target", ["/etc/passwd", "javascript:alert(1)", "https://example.org"])
def test_only_files_below_the_page_are_linked(target):
    with pytest.raises(ValueError, match="cannot be linked"):
        Page("Link").link("text", target)


def test_two_writes_give_the_same_bytes_and_a_failed_one_leaves_the_old_page(tmp_path):
    def build():
        page = Page("Same", "twice")
        page.image(curve(), "drawn anew")
        page.table(["a"], [[1.0]])
        return page

    build().write(tmp_path / "deep/one.html")
    build().write(tmp_path / "two.html")
    assert (tmp_path / "deep/one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    broken = build()
    broken.html = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.write(tmp_path / "two.html")
    assert (tmp_path / "deep/one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["deep", "two.html"]


def test_a_warning_names_the_settings_that_it_belongs_to():
    assert attributed({"ddim, 2 steps": ["Clipped.", "Few.", "Few."]}) == ["Clipped.", "Few."]
    said = {"ddim, 2 steps": ["99% clipped.", "Few."], "heun, 2 steps": ["Few."], "heun, 9 steps": ["7% clipped."]}
    assert attributed(said) == [
        "ddim, 2 steps: 99% clipped.",
        "ddim, 2 steps; heun, 2 steps: Few.",
        "heun, 9 steps: 7% clipped.",
    ]
