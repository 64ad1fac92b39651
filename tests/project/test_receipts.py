"""Figures of docs/results.md that name a receipt are the receipt's."""

import json
import re

import pytest
from renew_docs import ROOT

PAGE = ROOT / "docs/results.md"
LINK = re.compile(r"\((receipts/[\w./]+\.json)\)")
COMMAND = re.compile(r"`diffusion-lit evaluate ([^`]*)`")
ITEMS = re.findall(r"^\d+\. .*(?:\n {3,}.*)*", PAGE.read_text(), re.MULTILINE)
ROWS = [item for item in ITEMS if LINK.search(item)]


def figures(receipt):
    """The figures that a row must give: distances, PSNR or what is read, as they are written there."""
    if "read as intended" in receipt:
        read = (receipt[name] for name in ("read as intended", "held-out digits read"))
        return [f"{100 * share:.1f}%" for share in read] + [f"{receipt['recall by samples']:.2f}"]
    if "track" in receipt:
        means = (value["mean"] for value in receipt["summary"].values())
        return [f"{value:.2f}" for value in (*means, *(run["figures"]["as configured"] for run in receipt["runs"]))]
    if "rows" in receipt:
        return [f"{row[name]:.2f}" for row in receipt["rows"] for name in ("psnr", receipt["metric"])]
    if "single_image" in receipt["results"][0]:
        return [f"{result['single_image']['psnr']:.1f} dB" for result in receipt["results"]]
    metric = receipt["extractor"]["metric"]
    return [f"{result['references']['train']['figures'][metric]['mean']:.2f}" for result in receipt["results"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition(".")[0])
def test_a_row_gives_the_figures_of_its_receipts(row):
    for path in LINK.findall(row):
        for figure in figures(json.loads((PAGE.parent / path).read_text())):
            assert figure in row, (path, figure)


@pytest.mark.parametrize("row", [row for row in ROWS if COMMAND.search(row)], ids=lambda row: row.partition(".")[0])
def test_a_receipt_is_of_the_command_of_its_row(row):
    words = COMMAND.search(row).group(1).split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    for path in LINK.findall(row):
        receipt = json.loads((PAGE.parent / path).read_text())
        samples = receipt["samples"]
        assert samples["num_samples"] == int(options["--num_samples"]), path
        assert samples["num_blocks"] == int(options.get("--num_blocks", 3)), path
        assert receipt["extractor"]["name"] == options.get("--extractor", receipt["extractor"]["name"]), path
        for option, name in {"--num_steps": "num_steps", "--cfg_scale": "cfg_scale"}.items():
            if option in options:
                told = [result["sampling"][name] for result in receipt["results"]]
                assert told == [float(value) for value in options[option].split(",")], (path, option)


def test_every_receipt_belongs_to_a_row():
    linked = {path for row in ROWS for path in LINK.findall(row)}
    kept = {str(path.relative_to(PAGE.parent)) for path in (PAGE.parent / "receipts").rglob("*.json")}
    assert kept == linked
    assert kept


def test_tables_have_short_cells_and_the_figures_of_the_commands_below_them():
    text = PAGE.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "](" not in line]
    long = [cell for line in lines for cell in line.split("|") if len(cell) > 90]
    assert lines and not long
    numbers = re.findall(r"^\| (\d+) \|", text.partition("By these commands")[0], re.MULTILINE)
    assert numbers == [item.partition(".")[0] for item in ITEMS]
