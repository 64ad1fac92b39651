"""Random crops of a small set: where they lie, that they are the images' own, and that their size is told."""

import numpy as np
import pytest
import torch
from helpers.data_fixtures import make_image
from PIL import Image

import datamodules
from datamodules import ImageFolder
from datamodules.decode import Crops, Transform, decode


def write(folder, count=12, size=(96, 64)):
    folder.mkdir()
    for number in range(count):
        make_image(size, seed=number).save(folder / f"{number}.png")
    return folder


def data_of(folder, tmp_path, **options):
    made = ImageFolder(str(folder), batch_size=4, image_size=16, cache_dir=str(tmp_path / "cache"), **options)
    made.prepare_data()
    made.setup()
    return made


def test_a_row_is_the_centre_and_the_crops_that_its_boxes_say(tmp_path):
    """Each square is what resizing its box alone gives; boxes lie within the image, and their sizes are as told."""
    transform = Crops(16, crops=20, smallest=0.4)
    path = tmp_path / "one.png"
    image = make_image((96, 64), seed=3)
    image.save(path)
    with path.open("rb") as file:
        made = decode(file, transform)
    assert made.shape == transform.row_shape == (21, 3, 16, 16)
    with path.open("rb") as file:
        assert np.array_equal(made[0], decode(file, Transform(16)))
    import hashlib

    key = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    boxes = transform.boxes((96, 64), 64, key)
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= 96 and 0 <= top < bottom <= 64
        assert right - left == pytest.approx(bottom - top)
        assert (right - left) / 64 == pytest.approx(transform.share(key, number))
        alone = image.resize((16, 16), Image.Resampling.LANCZOS, (left, top, right, bottom))
        assert np.array_equal(made[number], np.asarray(alone).transpose(2, 0, 1))
    shares = [transform.share(key, number) for number in range(1, 21)]
    assert min(shares) >= 0.4 and max(shares) <= 1 and np.std(shares) > 0.1
    assert max(right for _, _, right, _ in boxes) > 85 and min(left for left, *_ in boxes) < 10  # sides too


def test_training_has_all_squares_and_held_out_images_are_centres(tmp_path):
    folder = write(tmp_path / "data")
    plain, cropped = data_of(folder, tmp_path), data_of(folder, tmp_path, crops=3, smallest_crop=0.5)
    assert len(cropped.reference_images("train")) == 4 * len(plain.reference_images("train"))
    for split in ("val", "test"):
        assert np.array_equal(cropped.reference_images(split), plain.reference_images(split))
    assert np.array_equal(cropped.reference_images("train")[::4], plain.reference_images("train"))
    sizes = cropped.crop_sizes
    assert sizes.shape == (len(cropped.reference_images("train")), 1)
    assert torch.equal(sizes[::4], torch.zeros_like(sizes[::4])) and -1 <= float(sizes.min()) < -0.3
    batch = next(iter(cropped.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert plain.fingerprint("train") != cropped.fingerprint("train")


def test_classes_are_those_of_the_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write(tmp_path / "data" / name, 6)
    plain, cropped = data_of(tmp_path / "data", tmp_path), data_of(tmp_path / "data", tmp_path, crops=1)
    labels = plain.reference_labels("train")
    assert torch.equal(cropped.reference_labels("train"), labels.repeat_interleave(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": -1}, "crops is -1"),
        ({"crops": 2, "smallest_crop": 0.0}, "smallest_crop is 0"),
        ({"crops": 2, "crop": 20}, "crop is 20 and crops 2"),
        ({"crops": 2, "split_by": "order"}, "crops is 2 and split_by 'order'"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path), **options)


def test_an_image_too_small_for_its_crops_is_left_out(tmp_path):
    folder = write(tmp_path / "data", 8)
    make_image((30, 30), seed=50).save(folder / "small.png")
    with pytest.warns(UserWarning, match="small.png is 30x30 pixels, and its smallest crop 15, less than 16"):
        data_of(folder, tmp_path, crops=1)


def test_a_network_is_told_the_size_and_a_latent_cache_holds_all_crops(tmp_path, monkeypatch):
    from lightning.pytorch import Trainer

    from diffusion_lit.modules import EDM
    from diffusion_lit.nets import UNet

    monkeypatch.setattr(datamodules.ImageFolder, "class_names", [])
    data = data_of(write(tmp_path / "data"), tmp_path, crops=3, random_flip=False)
    told = []
    net = UNet(3, 16, 0, 8, (1, 2), 1, (), noise_embedding="fourier", augment_dim=1)
    net.conditioning.augment.register_forward_hook(lambda layer, args, made: told.append(args[0].clone()))
    rows = []

    class Watched(EDM):
        def training_step(self, batch, batch_idx):
            rows.append(batch["index"].clone())
            return super().training_step(batch, batch_idx)

    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1,
    )  # fmt: skip
    module = Watched(net)
    trainer.fit(module, datamodule=data)
    assert len(told) == len(rows) == 3  # held-out images have no crop
    for sizes, index in zip(told, rows, strict=True):
        assert torch.equal(sizes, data.crop_sizes[index])
