"""Bad input of many kinds: each gives a sentence that names the file, or a counted skip; nothing hangs or stays."""

import gzip
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.data_fixtures import make_image, write_celeba, write_cifar10, write_idx, write_mnist
from PIL import Image

from datamodules import CIFAR10, MNIST, CelebA, ImageDataModule, ImageFolder, SingleImage

SECONDS = 30


@pytest.fixture(autouse=True)
def no_hanging():
    """Fails a test that hangs."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hung for {SECONDS} seconds"))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


def encoded(format: str, size=(64, 48), **options) -> bytes:
    file = io.BytesIO()
    make_image(size).save(file, format, **options)
    return file.getvalue()


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def saved(array: np.ndarray, format: str = "TIFF") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format)
    return file.getvalue()


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def huge_tiff() -> bytes:
    entries = [(256, 4, 1, 100_000), (257, 4, 1, 100_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (278, 4, 1, 100_000), (279, 4, 1, 10)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)


BAD_FILES: dict[str, tuple[str, bytes]] = {
    "no bytes": ("bad.jpg", b""),
    "one byte": ("bad.png", b"\x89"),
    "text": ("bad.jpg", b"this is not an image\n" * 10),
    "a web page": ("bad.jpeg", b"<!DOCTYPE html><html><body>404</body></html>"),
    "random bytes": ("bad.png", np.random.default_rng(0).bytes(5000)),
    "only zeros": ("bad.bmp", bytes(5000)),
    "a cut JPEG": ("bad.jpg", cut(encoded("JPEG"))),
    "a cut progressive JPEG": ("bad.jpg", cut(encoded("JPEG", progressive=True))),
    "a JPEG's first bytes": ("bad.jpg", encoded("JPEG")[:20]),
    "a cut PNG": ("bad.png", cut(encoded("PNG"))),
    "a cut WebP": ("bad.webp", cut(encoded("WEBP"))),
    "a cut BMP": ("bad.bmp", cut(encoded("BMP"))),
    "a cut TIFF": ("bad.tif", cut(encoded("TIFF"))),
    "a cut TIFF with LZW": ("bad.tiff", cut(encoded("TIFF", compression="tiff_lzw"))),
    "a PNG with a wrong checksum": ("bad.png", flipped(encoded("PNG"), 60)),
    "a PNG without pixels": ("bad.png", png(64, 64)),
    "a PNG of no size": ("bad.png", png(0, 0, png_chunk(b"IDAT", zlib.compress(b"")))),
    "a PNG with too few pixels": ("bad.png", png(64, 64, png_chunk(b"IDAT", zlib.compress(bytes(100))))),
    "a PNG whose pixels are no zlib": ("bad.png", png(64, 64, png_chunk(b"IDAT", b"nonsense" * 20))),
    "a PNG that claims a gigapixel": ("bad.png", png(60_000, 60_000, png_chunk(b"IDAT", zlib.compress(bytes(100))))),
    "a PNG with a bomb in its text": (
        "bad.png",
        png(64, 64, png_chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(70_000_000)))),
    ),
    "a BMP that claims a gigapixel": ("bad.bmp", bmp(50_000, 50_000)),
    "a BMP of negative width": ("bad.bmp", bmp(-64, 48)),
    "a TIFF that claims a gigapixel": ("bad.tif", huge_tiff()),
    "a PPM": ("bad.png", encoded("PPM")),
    "PostScript": ("bad.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"),
    "SVG": ("bad.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>'),
    "a zip": ("bad.jpg", b"PK\x05\x06" + bytes(18)),
    "one pixel": ("bad.png", encoded("PNG", size=(1, 1))),
    "a line": ("bad.png", encoded("PNG", size=(500, 3))),
    "floating-point pixels": ("bad.tif", saved(np.random.default_rng(0).random((64, 64)).astype(np.float32))),
    "32-bit pixels": ("bad.tif", saved(np.full((64, 64), 1 << 20, np.int32))),
    "a name that is no text": (os.fsdecode(b"bad\xff\xfe.jpg"), b""),
    "a name of two lines": ("bad\nname.jpg", b""),
}


def good_folder(folder: Path, count: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        make_image((40, 40), seed=number).save(folder / f"good{number}.png")


def folder_of(root: Path | str | list[str], tmp_path: Path, **options) -> ImageFolder:
    root = str(root) if isinstance(root, Path) else root
    return ImageFolder(root, 1, 32, cache_dir=str(tmp_path / "cache"), val_fraction=0, test_fraction=0, **options)


def assert_clean(cache: Path, caches: int) -> None:
    """Nothing half-written is in a folder of caches, and so many whole ones."""
    assert not list(cache.glob(".*"))
    assert len(list(cache.glob("*/index.json"))) == len([path for path in cache.glob("*") if path.is_dir()]) == caches


def assert_skipped(root: Path, tmp_path: Path, name: str, good: int = 4) -> None:
    """The one bad image is counted, named and left out, and with `strict` stops."""
    with pytest.warns(UserWarning, match="1 image was skipped") as told:
        data = folder_of(root, tmp_path)
        data.prepare_data()
    message = next(str(warning.message) for warning in told if "skipped" in str(warning.message))
    assert name in message and "\n" not in message and message.endswith(".")
    assert len(data.cache.names) == good and len(data.reference_images("train")) == good
    assert_clean(tmp_path / "cache", 1)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="strict is true") as stopped:
        folder_of(root, tmp_path, strict=True).prepare_data()
    assert name in str(stopped.value)
    assert not (tmp_path / "cache").exists() or not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_image_is_skipped_and_counted(tmp_path, kind):
    name, data = BAD_FILES[kind]
    good_folder(tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(data)
    assert_skipped(tmp_path / "data", tmp_path, name if name.isprintable() else "bad\\")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere.jpg")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_fifo, link_to_nowhere, link_to_itself, link_to_device])
def test_what_is_no_file_is_skipped_and_counted(tmp_path, make):
    good_folder(tmp_path / "data")
    make(tmp_path / "data" / "bad.jpg")
    assert_skipped(tmp_path / "data", tmp_path, "bad.jpg")


def zip_of(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """A zip of four good images and one that is then changed in its bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            archive.writestr(f"good{number}.png", encoded("PNG", size=(40 + number, 40)))
        archive.writestr("bad.png", b"BAD" + encoded("PNG"))
    path.write_bytes(change(path.read_bytes()))
    return path


def central(data: bytes, offset: int, value: bytes) -> bytes:
    """Changes the bad image's entry in the central directory and, where it has the field too, before its data."""
    data = bytearray(data)
    entry = data.rindex(b"PK\x01\x02")
    data[entry + offset : entry + offset + len(value)] = value
    local = data.index(b"bad.png") - 30
    if offset - 2 < 26:
        data[local + offset - 2 : local + offset - 2 + len(value)] = value
    return bytes(data)


MEMBERS = {
    "damaged": lambda data: data.replace(b"BAD", b"WAS"),
    "encrypted": lambda data: central(data, 8, b"\x01\x00"),
    "compressed in a way that nobody knows": lambda data: central(data, 10, struct.pack("<H", 77)),
    "said to have four gigabytes": lambda data: central(data, 24, struct.pack("<I", 2**32 - 2)),
    "somewhere else": lambda data: central(data, 42, struct.pack("<I", data.index(b"bad.png") - 30 + 5)),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_bad_member_of_a_zip_is_skipped_and_counted(tmp_path, kind):
    assert_skipped(zip_of(tmp_path / "data.zip", MEMBERS[kind]), tmp_path, "bad.png")


def refused(make: Callable[[], ImageDataModule], *names: str) -> str:
    """A data module stops with one sentence that names what is wrong; returns it."""
    with warnings.catch_warnings(), pytest.raises((ValueError, OSError)) as told:
        warnings.simplefilter("ignore")
        data = make()
        data.prepare_data()
        data.setup()
    message = str(told.value)
    assert type(told.value) in (ValueError, FileNotFoundError, PermissionError), repr(told.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 1200
    assert all(name in message for name in names), message
    return message


def write_nothing(root: Path) -> str:
    return str(root / "nowhere")


def write_empty_folder(root: Path) -> str:
    return str(root)


def write_only_text(root: Path) -> str:
    (root / "readme.txt").write_text("no images here")
    return str(root)


def write_only_bad(root: Path) -> str:
    (root / "bad.jpg").write_bytes(b"")
    return str(root)


def write_text_as_root(root: Path) -> str:
    (root / "file.txt").write_text("text")
    return str(root / "file.txt")


def write_cut_zip(root: Path) -> str:
    path = zip_of(root / "cut.zip", cut)
    return str(path)


def write_empty_zip(root: Path) -> str:
    zipfile.ZipFile(root / "empty.zip", "w").close()
    return str(root / "empty.zip")


def write_zip_of_text(root: Path) -> str:
    with zipfile.ZipFile(root / "text.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    return str(root / "text.zip")


def write_long_name(root: Path) -> str:
    return str(root / ("x" * 300))


def write_fifo_as_root(root: Path) -> str:
    os.mkfifo(root / "fifo")
    return str(root / "fifo")


def write_loop_as_root(root: Path) -> str:
    (root / "loop").symlink_to(root / "loop")
    return str(root / "loop")


ROOTS = [
    (write_nothing, "nowhere does not exist"),
    (write_empty_folder, "There is no image in"),
    (write_only_text, "There is no image in"),
    (write_only_bad, "bad.jpg is not an image"),
    (write_text_as_root, "file.txt is neither a folder nor a whole zip"),
    (write_cut_zip, "cut.zip is neither a folder nor a whole zip"),
    (write_empty_zip, "There is no image in"),
    (write_zip_of_text, "There is no image in"),
    (write_long_name, "does not exist"),
    (write_fifo_as_root, "fifo is neither a folder nor a zip"),
    (write_loop_as_root, "loop does not exist"),
]


@pytest.mark.parametrize(("write", "expected"), ROOTS)
def test_bad_root_is_refused(tmp_path, write, expected):
    (tmp_path / "data").mkdir()
    root = write(tmp_path / "data")
    refused(lambda: folder_of(root, tmp_path), expected, os.path.basename(root)[:100])
    assert not list((tmp_path / "cache").glob("*/index.json")) and not list((tmp_path / "cache").glob(".*"))


def test_globs_that_find_nothing_are_refused(tmp_path):
    refused(lambda: folder_of([f"{tmp_path}/*.jpg"], tmp_path), f"{tmp_path}/*.jpg", "No image matches")
    refused(lambda: folder_of([], tmp_path), "root is an empty list")


def test_links_in_a_circle_end(tmp_path):
    good_folder(tmp_path / "data" / "a")
    for name in ("one", "two", "three"):
        (tmp_path / "data" / "a" / name).symlink_to(tmp_path / "data")
    for root in (str(tmp_path / "data"), f"{tmp_path}/data/**", f"{tmp_path}/data/**/*.png"):
        data = folder_of(root, tmp_path)
        data.prepare_data()
        assert len(data.cache.names) == 4


def test_cache_folder_that_is_a_file_is_refused(tmp_path):
    good_folder(tmp_path / "data")
    (tmp_path / "cache").write_text("a file")
    refused(lambda: folder_of(tmp_path / "data", tmp_path), str(tmp_path / "cache"), "set cache_dir")


def idx(rank: int, sizes: list[int], count: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, rank]) + struct.pack(f">{len(sizes)}I", *sizes) + bytes(count)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
IDX: dict[str, tuple[str, bytes]] = {
    "no bytes": (IMAGES, b""),
    "text": (IMAGES, b"text " * 100),
    "another rank": (IMAGES, idx(1, [120], 120)),
    "another type": (LABELS, idx(1, [120], 480, kind=0x0C)),
    "images for labels": (LABELS, idx(3, [120, 28, 28], 120 * 784)),
    "a cut file": (IMAGES, idx(3, [120, 28, 28], 120 * 784 - 1)),
    "an overlong file": (IMAGES, idx(3, [120, 28, 28], 120 * 784 + 1)),
    "a header that claims terabytes": (IMAGES, idx(3, [2**32 - 1] * 3, 100)),
    "a header that claims two gigabytes": (IMAGES, idx(3, [2_700_000, 28, 28], 100)),
    "another size": (IMAGES, idx(3, [120, 27, 28], 120 * 27 * 28)),
    "fewer images than labels": (IMAGES, idx(3, [119, 28, 28], 119 * 784)),
    "a label out of range": (LABELS, idx(1, [120], 119) + b"\x0a"),
    "gzip that is none": (IMAGES + ".gz", b"text " * 100),
    "gzip that is cut": (IMAGES + ".gz", cut(gzip.compress(idx(3, [120, 28, 28], 120 * 784)))),
    "gzip with a wrong checksum": (IMAGES + ".gz", flipped(gzip.compress(idx(3, [120, 28, 28], 120 * 784)), -6)),
    "gzip that holds a bomb": (IMAGES + ".gz", gzip.compress(idx(3, [120, 28, 28], 100_000_000), 1)),
}


@pytest.mark.parametrize("kind", IDX)
def test_bad_idx_file_is_refused(tmp_path, kind):
    name, data = IDX[kind]
    write_mnist(tmp_path, zipped=False)
    if name.endswith(".gz"):
        (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(data)
    refused(lambda: MNIST(str(tmp_path), download=False), name)


def test_missing_idx_file_and_folder_in_its_place_are_told(tmp_path):
    write_mnist(tmp_path, zipped=False)
    (tmp_path / LABELS).unlink()
    refused(lambda: MNIST(str(tmp_path), download=False), LABELS, str(tmp_path))
    (tmp_path / LABELS).mkdir()
    refused(lambda: MNIST(str(tmp_path), download=False), LABELS, str(tmp_path))
    write_idx(tmp_path / "train-labels.idx1-ubyte", np.zeros(120))  # another usual spelling
    MNIST(str(tmp_path), download=False).prepare_data()


class Evil:
    """Would leave a file behind, if it were called."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def batch(**changes) -> bytes:
    held = {b"data": np.zeros((20, 3072), np.uint8), b"labels": [0] * 20}
    held |= {name.encode(): value for name, value in changes.items()}
    return pickle.dumps({name: value for name, value in held.items() if value is not None}, 2)


CIFAR: dict[str, bytes] = {
    "no bytes": b"",
    "text": b"text " * 100,
    "a cut pickle": cut(batch()),
    "a list": pickle.dumps([1, 2, 3]),
    "no data": batch(data=None),
    "no labels": batch(labels=None),
    "data of floats": batch(data=np.zeros((20, 3072))),
    "data of other width": batch(data=np.zeros((20, 3000), np.uint8)),
    "data of three dimensions": batch(data=np.zeros((20, 3, 1024), np.uint8)),
    "data that is a list": batch(data=[[0] * 3072] * 20),
    "data of objects": batch(data=np.array([[{}]], dtype=object)),
    "labels out of range": batch(labels=[0] * 19 + [10]),
    "negative labels": batch(labels=[0] * 19 + [-1]),
    "labels that are text": batch(labels=["0"] * 20),
    "fewer labels than images": batch(labels=[0] * 19),
    "a class of another library": pickle.dumps(Path("x")),
    "a function of numpy": pickle.dumps(np.load),
    "a name inside numpy": b"cnumpy\nload\n.",
    "an array of terabytes": b"\x80\x02cnumpy\nndarray\n(K\x01\x8a\x06\xff\xff\xff\xff\xff\x00\x86tR.",
    "references to nowhere": b"\x80\x02h\x05.",
    "an array that lies about its shape": pickle.dumps({b"data": np.zeros((20, 3072), np.uint8)}, 2).replace(
        struct.pack("<BH", ord("M"), 3072), struct.pack("<BH", ord("M"), 4000)
    ),
    "deep nesting": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
}


@pytest.mark.parametrize("kind", CIFAR)
def test_bad_cifar_pickle_is_refused(tmp_path, kind):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(CIFAR[kind])
    refused(lambda: CIFAR10(str(tmp_path), download=False), "data_batch_3")


def test_pickle_that_runs_a_command_is_refused_unrun(tmp_path):
    write_cifar10(tmp_path)
    victim = tmp_path / "cifar-10-batches-py" / "test_batch"
    victim.write_bytes(batch(data=Evil(tmp_path / "was here")))
    message = refused(lambda: CIFAR10(str(tmp_path), download=False), "test_batch")
    assert re.search(r"asks for (posix|nt|os)\.system", message) and not (tmp_path / "was here").exists()


@pytest.mark.parametrize("data", [b"", b"text", cut(gzip.compress(bytes(10_000)))], ids=["empty", "text", "cut"])
def test_bad_cifar_archive_is_refused_and_nothing_stays(tmp_path, data):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(data)
    refused(lambda: CIFAR10(str(tmp_path), download=False), "cifar-10-python.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


def change(name: str, function: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(function((root / name).read_text())) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (shutil.rmtree if (root / name).is_dir() else os.unlink)(root / name)


def zip_that_is_none(root: Path) -> None:
    shutil.rmtree(root / "img_align_celeba")
    (root / "img_align_celeba.zip").write_text("text")


PARTITION, ATTRIBUTES = "list_eval_partition.txt", "list_attr_celeba.txt"
CELEBA: dict[str, tuple[Callable[[Path], None], str]] = {
    "no images": (remove("img_align_celeba"), "img_align_celeba"),
    "no partition": (remove(PARTITION), "list_eval_partition"),
    "no attributes": (remove(ATTRIBUTES), "list_attr_celeba"),
    "an empty partition": (change(PARTITION, lambda text: ""), PARTITION),
    "a split that does not exist": (change(PARTITION, lambda text: text.replace(" 2", " 3")), PARTITION),
    "a partition of one column": (change(PARTITION, lambda text: text.replace(" ", "_")), PARTITION),
    "a partition of other images": (change(PARTITION, lambda text: text.replace("0000", "1111")), PARTITION),
    "a partition that is no text": (lambda root: (root / PARTITION).write_bytes(b"\xff\xfe\0") and None, PARTITION),
    "attributes without ours": (change(ATTRIBUTES, lambda text: text.replace("Smiling", "Sad")), ATTRIBUTES),
    "attributes out of range": (change(ATTRIBUTES, lambda text: text.replace("-1", "7")), ATTRIBUTES),
    "a cut line of attributes": (change(ATTRIBUTES, lambda text: text[:-8]), ATTRIBUTES),
    "too few lines of attributes": (change(ATTRIBUTES, lambda text: text[: text.index("000005")]), "000005.jpg"),
    "empty attributes": (change(ATTRIBUTES, lambda text: ""), ATTRIBUTES),
    "a zip that is none": (
        zip_that_is_none,
        "img_align_celeba.zip",
    ),
}


@pytest.mark.parametrize("kind", CELEBA)
def test_bad_celeba_is_refused(tmp_path, kind):
    damage, name = CELEBA[kind]
    write_celeba(tmp_path / "celeba")
    damage(tmp_path / "celeba")
    cache = str(tmp_path / "cache")
    refused(lambda: CelebA(str(tmp_path / "celeba"), cache_dir=cache, attributes=["Smiling"]), name)
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("data", [b"", b"text", cut(encoded("JPEG"))], ids=["empty", "text", "cut"])
def test_bad_single_image_is_refused(tmp_path, data):
    (tmp_path / "bad.jpg").write_bytes(data)
    refused(lambda: SingleImage(str(tmp_path / "bad.jpg")), "bad.jpg")
    refused(lambda: SingleImage(str(tmp_path)), str(tmp_path))


def as_nobody(function: Callable[[], object]) -> object:
    """What a function returns in a child process that has dropped root."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        theirs.send(function())

    child = context.Process(target=run)
    child.start()
    theirs.close()
    assert ours.poll(SECONDS)
    answer = ours.recv()
    child.join()
    return answer


@pytest.fixture
def open_path():
    """A temporary folder that everybody may enter and write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for below in folder.rglob("*"):
        if below.is_dir():
            below.chmod(0o755)
    shutil.rmtree(folder)


def counted(root: Path, tmp_path: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = folder_of(root, tmp_path)
        data.prepare_data()
    return [str(len(data.cache.names)), *(str(warning.message) for warning in told)]


def test_unreadable_image_is_skipped_and_counted(open_path):
    good_folder(open_path / "data")
    make_image((40, 40)).save(open_path / "data" / "bad.png")
    (open_path / "data" / "bad.png").chmod(0)
    count, *told = as_nobody(lambda: counted(open_path / "data", open_path))
    assert count == "4" and any("1 image was skipped: bad.png may not be read (no permission)" in line for line in told)


def test_unreadable_folder_below_is_skipped_and_counted(open_path):
    good_folder(open_path / "data" / "a")
    good_folder(open_path / "data" / "b")
    (open_path / "data" / "b").chmod(0)
    count, *told = as_nobody(lambda: counted(open_path / "data", open_path))
    assert count == "4" and any("1 image was skipped: b cannot be listed (Permission denied)" in line for line in told)


def unreadable_root(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    good_folder(root / "data")
    (root / "data").chmod(0)
    return lambda: folder_of(root / "data", root), "data may not be read"


def unreadable_parent(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    good_folder(root / "above" / "data")
    (root / "above").chmod(0)
    return lambda: folder_of(root / "above" / "data", root), "data may not be looked at"


def unreadable_zip(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    zip_of(root / "data.zip", lambda data: data).chmod(0)
    return lambda: folder_of(root / "data.zip", root), "data.zip may not be read"


def unwritable_cache(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    good_folder(root / "data")
    (root / "cache").mkdir(mode=0o555)
    return lambda: folder_of(root / "data", root), "cache (Permission denied); set cache_dir"


def unreadable_idx(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    write_mnist(root / "data", zipped=False)
    (root / "data" / IMAGES).chmod(0)
    return lambda: MNIST(str(root / "data"), download=False), IMAGES


def unreadable_pickle(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    write_cifar10(root)
    (root / "cifar-10-batches-py" / "data_batch_2").chmod(0)
    return lambda: CIFAR10(str(root), download=False), "data_batch_2"


def unreadable_partition(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    write_celeba(root / "celeba")
    (root / "celeba" / PARTITION).chmod(0)
    return lambda: CelebA(str(root / "celeba"), cache_dir=str(root / "cache")), PARTITION


def unreadable_single(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    make_image((64, 64)).save(root / "bad.png")
    (root / "bad.png").chmod(0)
    return lambda: SingleImage(str(root / "bad.png")), "bad.png may not be read"


def unwritable_download(root: Path) -> tuple[Callable[[], ImageDataModule], str]:
    (root / "data").mkdir(mode=0o555)
    return lambda: MNIST(str(root / "data")), "the download failed"


DENIED = [
    unreadable_root, unreadable_parent, unreadable_zip, unwritable_cache, unreadable_idx, unreadable_pickle,
    unreadable_partition, unreadable_single, unwritable_download,
]  # fmt: skip


@pytest.mark.parametrize("deny", DENIED)
def test_missing_permission_is_told(open_path, deny):
    make, expected = deny(open_path)
    as_nobody(lambda: refused(make, expected))


def test_there_are_at_least_forty_kinds():
    assert len(BAD_FILES) + len(MEMBERS) + len(ROOTS) + len(IDX) + len(CIFAR) + len(CELEBA) + len(DENIED) >= 100
