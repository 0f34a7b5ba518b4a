"""Data sets, against the very pixels they were made of; batches, against one image at a time."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_images import class_folder, parquet, pixels, png
from PIL import Image

from fewbits._errors import FileError
from fewbits.lab.data import Augment, ImageData, batches, default_augment, load

SHARED = Path(__file__).parents[3] / "shared" / "data" / "cifar10"


def image(seed: int, **size: int) -> torch.Tensor:
    """(C, H, W) of `pixels(seed)`."""
    return torch.from_numpy(pixels(seed, **size)).permute(2, 0, 1)


def data_of(train: torch.Tensor, test: torch.Tensor | None = None) -> ImageData:
    labels = torch.arange(len(train)) % 3
    test = train[:2] if test is None else test
    return ImageData("made", train, labels, test, labels[: len(test)], ("a", "b", "c"))


# -- digits ---------------------------------------------------------------------------------------


def test_digits_hold_out_a_fifth_of_each_class():
    from sklearn import datasets

    data = load("digits")
    pictures, target = datasets.load_digits(return_X_y=True)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.shape == (1, 8, 8)
    assert not data.flips
    for digit in range(10):
        members = int((target == digit).sum())
        assert int((data.test_labels == digit).sum()) == round(0.2 * members)
    # Training and held-out rows together are all the rows, each once.
    rows = torch.cat([data.train_images, data.test_images]).flatten(1).double() / 15
    labels = torch.cat([data.train_labels, data.test_labels]).double()[:, None]
    found = torch.cat([rows, labels], 1).tolist()
    wanted = np.column_stack([pictures, target]).tolist()
    assert sorted(found) == sorted(wanted)


def test_an_unknown_name_is_refused_with_what_there_is():
    with pytest.raises(FileError, match="no-such-data: no such data. Give digits, cifar10, or a"):
        load("no-such-data")


# -- folders of classes ---------------------------------------------------------------------------


def test_train_and_test_folders_keep_every_pixel_and_label(tmp_path: Path):
    class_folder(tmp_path / "train", {"cat": 2, "dog": 1})
    class_folder(tmp_path / "test", {"dog": 2}, first=10)
    data = load(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert torch.equal(data.train_images, torch.stack([image(i) for i in (0, 1, 2)]))
    assert data.train_labels.tolist() == [0, 0, 1]
    assert torch.equal(data.test_images, torch.stack([image(10), image(11)]))
    assert data.test_labels.tolist() == [1, 1]
    assert data.shape == (3, 6, 5)


def test_validation_is_held_out_only_where_there_is_no_test(tmp_path: Path):
    class_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    class_folder(tmp_path / "val", {"cat": 1}, first=10)
    assert torch.equal(load(str(tmp_path)).test_images, image(10)[None])
    class_folder(tmp_path / "test", {"cat": 1}, first=20)
    assert torch.equal(load(str(tmp_path)).test_images, image(20)[None])


def test_without_a_split_a_fifth_of_each_class_is_held_out_always_the_same(tmp_path: Path):
    class_folder(tmp_path, {"cat": 10, "dog": 5})
    class_folder(tmp_path / ".hidden", {"copies": 1})
    data, again = load(str(tmp_path)), load(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.test_labels.tolist() == [0, 0, 1]
    assert torch.equal(data.test_images, again.test_images)
    found = torch.cat([data.train_images, data.test_images]).flatten(1).tolist()
    assert sorted(found) == sorted(image(i).flatten().tolist() for i in range(15))


def test_a_class_that_only_the_test_folder_has_is_refused(tmp_path: Path):
    class_folder(tmp_path / "train", {"cat": 1, "dog": 1})
    class_folder(tmp_path / "test", {"dogs": 1})
    with pytest.raises(FileError, match=r"dogs: no such class .* Did you mean 'dog'\?"):
        load(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(FileError, match=r"no images\. Give a folder of Parquet files, or one"):
        load(str(tmp_path))


def test_an_empty_test_folder_is_refused(tmp_path: Path):
    class_folder(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "test").mkdir()
    with pytest.raises(FileError, match=r"test: no images\. Remove the folder to hold out"):
        load(str(tmp_path))


def test_one_image_per_class_leaves_nothing_to_hold_out(tmp_path: Path):
    class_folder(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(FileError, match="no image can be held out. Give two or more of a class"):
        load(str(tmp_path))


def test_an_unreadable_image_is_named(tmp_path: Path):
    class_folder(tmp_path, {"cat": 3})
    (tmp_path / "cat" / "001.png").write_bytes(png(pixels(0))[:40])
    with pytest.raises(FileError, match=r"cat/001\.png: cannot be read as an image \(.*Remove it"):
        load(str(tmp_path))


def test_sixteen_bit_pixels_are_refused_rather_than_clipped(tmp_path: Path):
    class_folder(tmp_path, {"cat": 3})
    (tmp_path / "cat" / "000.png").write_bytes(png(np.full((6, 5), 40_000, np.uint16)))
    with pytest.raises(FileError, match=r"cat/000\.png: its pixels have more than 8 bits"):
        load(str(tmp_path))


def test_images_of_other_sizes_need_an_image_size(tmp_path: Path):
    class_folder(tmp_path / "train", {"cat": 3}, height=6, width=5)
    class_folder(tmp_path / "test", {"cat": 1}, height=6, width=7)
    with pytest.raises(FileError, match=r"training images are 5 x 6, held-out ones 7 x 6.*--image"):
        load(str(tmp_path))
    (tmp_path / "train" / "cat" / "002.png").write_bytes(png(pixels(0, 8, 9)))
    with pytest.raises(
        FileError, match=r"002\.png: is 9 x 8 pixels, the first image 5 x 6\..*--im"
    ):
        load(str(tmp_path))
    data = load(str(tmp_path), image_size=4)
    assert data.shape == (3, 4, 4)
    assert data.train_images.shape == (3, 3, 4, 4)


def test_image_size_scales_the_shorter_side_and_cuts_out_the_center(tmp_path: Path):
    # Two columns of one gray on either side of a white square: the cut leaves the square.
    wide = np.full((4, 8, 3), 10, np.uint8)
    wide[:, 2:6] = 255
    (tmp_path / "a").mkdir()
    for i in range(2):
        (tmp_path / "a" / f"{i}.png").write_bytes(png(wide))
    data = load(str(tmp_path), image_size=4)
    assert data.train_images.shape == (1, 1, 4, 4)
    assert bool((data.train_images == 255).all())


def test_gray_images_become_one_channel_and_one_colored_image_keeps_three(tmp_path: Path):
    class_folder(tmp_path, {"cat": 5, "dog": 5}, channels=1)
    data = load(str(tmp_path))
    assert data.shape == (1, 6, 5)
    wanted = [pixels(i, channels=1).flatten().tolist() for i in range(10)]
    found = torch.cat([data.train_images, data.test_images]).flatten(1).tolist()
    assert sorted(found) == sorted(wanted)
    (tmp_path / "dog" / "000.png").write_bytes(png(pixels(0)))
    assert load(str(tmp_path)).shape == (3, 6, 5)


def test_a_turned_photograph_is_turned_upright(tmp_path: Path):
    (tmp_path / "a").mkdir()
    turned = Image.fromarray(pixels(0))
    exif = Image.Exif()
    exif[0x0112] = 6  # "orientation": the camera was turned by a quarter
    for i in range(2):
        turned.save(tmp_path / "a" / f"{i}.png", exif=exif)
    data = load(str(tmp_path))
    assert torch.equal(data.train_images[0], torch.rot90(image(0), -1, (1, 2)))


# -- Parquet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet_keeps_every_pixel_label_and_class_name(tmp_path: Path, column: str, struct: bool):
    how = {"column": column, "struct": struct, "names": ["cat", "dog", "owl"]}
    shards = [(0, [1, 0]), (2, [0]), (3, [1, 1])]
    for i, (first, labels) in enumerate(shards):
        images = [png(pixels(first + j)) for j in range(len(labels))]
        parquet(tmp_path / "data" / f"train-0000{i}-of-00003.parquet", images, labels, **how)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [png(pixels(9))], [2], **how)
    data = load(str(tmp_path))
    assert data.classes == ("cat", "dog", "owl")
    assert torch.equal(data.train_images, torch.stack([image(i) for i in range(5)]))
    assert data.train_labels.tolist() == [1, 0, 0, 1, 1]
    assert torch.equal(data.test_images, image(9)[None])
    assert data.test_labels.tolist() == [2]


def test_the_split_may_be_the_name_of_the_folder(tmp_path: Path):
    for number, split in enumerate(("train", "validation", "test")):
        images = [png(pixels(10 * number + i)) for i in range(2)]
        parquet(tmp_path / "default" / split / "0000.parquet", images, [0, 1])
    data = load(str(tmp_path))
    assert torch.equal(data.train_images, torch.stack([image(0), image(1)]))
    assert torch.equal(data.test_images, torch.stack([image(20), image(21)]))  # not validation


def test_parquet_of_one_part_holds_out_a_fifth(tmp_path: Path):
    parquet(tmp_path / "all.parquet", [png(pixels(i)) for i in range(10)], [0, 1] * 5)
    data = load(str(tmp_path))
    assert data.classes == ("0", "1")
    assert sorted(data.test_labels.tolist()) == [0, 1]
    assert len(data.train_labels) == 8


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_names_file_and_row(tmp_path: Path, label: int):
    images = [png(pixels(i)) for i in range(3)]
    parquet(tmp_path / "train.parquet", images, [0, 2, label], names=["a", "b", "c"])
    with pytest.raises(FileError, match=rf"train\.parquet, row 2: label {label} is out of range"):
        load(str(tmp_path))


def test_without_class_names_a_label_above_the_number_of_images_is_refused(tmp_path: Path):
    images = [png(pixels(i)) for i in range(3)]
    parquet(tmp_path / "train.parquet", images, [0, 10**12, 1])
    with pytest.raises(FileError, match=r"row 1: label 1000000000000 is out of range"):
        load(str(tmp_path))


@pytest.mark.parametrize("label", [None, 0.5, "cat"])
def test_a_label_that_is_no_whole_number_names_file_and_row(tmp_path: Path, label: object):
    parquet(tmp_path / "train.parquet", [png(pixels(0))], [label])
    with pytest.raises(FileError, match=r"train\.parquet, row 0: label is .*\. Give a whole numb"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("cell", "what"), [(b"broken", "cannot be read as an im"), (None, "holds")]
)
def test_an_unreadable_parquet_image_names_file_and_row(tmp_path: Path, cell: object, what: str):
    parquet(tmp_path / "train.parquet", [png(pixels(0)), cell], [0, 1])
    with pytest.raises(FileError, match=rf"train\.parquet, row 1: {what}"):
        load(str(tmp_path))


def test_a_parquet_file_without_the_columns_is_refused_with_those_it_has(tmp_path: Path):
    parquet(tmp_path / "train.parquet", [png(pixels(0))], [0], column="photo")
    with pytest.raises(FileError, match=r"train\.parquet: columns are photo, label\. It needs img"):
        load(str(tmp_path))


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(FileError, match=r"train\.parquet: cannot be read as Parquet \("):
        load(str(tmp_path))


def test_parquet_files_without_training_rows_are_refused(tmp_path: Path):
    parquet(tmp_path / "test.parquet", [png(pixels(0))], [0])
    with pytest.raises(FileError, match=r"no Parquet file is named train"):
        load(str(tmp_path))
    parquet(tmp_path / "train.parquet", [], [])
    with pytest.raises(FileError, match=r"train\.parquet: no rows"):
        load(str(tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the CIFAR-10 Parquet files are not there")
def test_the_shared_cifar10_has_its_classes_and_its_shape(tmp_path: Path):
    # The smaller file alone: a fifth of it is held out.
    (tmp_path / "train.parquet").symlink_to(SHARED / "test.parquet")
    data = load(str(tmp_path))
    assert data.shape == (3, 32, 32)
    assert data.classes[0] == "airplane"
    assert data.classes[9] == "truck"
    assert data.train_labels.bincount().tolist() == [800] * 10
    assert data.test_labels.bincount().tolist() == [200] * 10


# -- the cache ------------------------------------------------------------------------------------


def test_the_second_time_images_come_from_the_cache(tmp_path: Path, own_cache: Path):
    class_folder(tmp_path, {"cat": 3})
    seen = []

    def progress(items, total: int):
        seen.append(total)
        return items

    first, second = (load(str(tmp_path), progress=progress) for _ in range(2))
    assert seen == [3]  # images were decoded once
    assert torch.equal(first.train_images, second.train_images)
    assert len(list(own_cache.iterdir())) == 1


def test_a_file_that_changes_is_decoded_anew_and_takes_no_more_room(
    tmp_path: Path, own_cache: Path
):
    class_folder(tmp_path / "train", {"cat": 2})
    class_folder(tmp_path / "test", {"cat": 1})
    load(str(tmp_path))
    changed = tmp_path / "train" / "cat" / "000.png"
    changed.write_bytes(png(pixels(77)))
    os.utime(changed, ns=(1, 1))  # the clock of the file system may be coarse
    assert torch.equal(load(str(tmp_path)).train_images[0], image(77))
    assert len(list(own_cache.iterdir())) == 2  # one file a split


def test_another_image_size_is_another_entry(tmp_path: Path):
    class_folder(tmp_path, {"cat": 3})
    assert load(str(tmp_path)).shape == (3, 6, 5)
    assert load(str(tmp_path), image_size=4).shape == (3, 4, 4)


@pytest.mark.parametrize("damage", ["cut short", "emptied"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, own_cache: Path, damage: str):
    class_folder(tmp_path, {"cat": 3})
    whole = load(str(tmp_path)).train_images
    (cached,) = own_cache.iterdir()
    cached.write_bytes(cached.read_bytes()[:150] if damage == "cut short" else b"")
    assert torch.equal(load(str(tmp_path)).train_images, whole)
    assert cached.stat().st_size > 150


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class_folder(tmp_path, {"cat": 3})
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load(str(tmp_path)).train_labels) == 2


# -- batches --------------------------------------------------------------------------------------


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that each hold their own number, and the numbers as labels."""
    labels = torch.arange(count)
    return labels.to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous(), labels


PLAIN = (torch.zeros(1), torch.ones(1))


@given(count=st.integers(1, 60), size=st.integers(2, 20), shuffled=st.booleans())
def test_an_epoch_covers_each_image_once(count: int, size: int, shuffled: bool):
    images, labels = numbered(count)
    generator = torch.Generator().manual_seed(3) if shuffled else None
    found = list(batches(images, labels, size, normalization=PLAIN, generator=generator))
    for x, y in found:
        assert x.dtype == torch.float32
        assert torch.equal(x[:, 0, 0, 0], y.float())
        assert len(y) <= size
    seen = sorted(int(i) for _, y in found for i in y)
    lone = shuffled and count % size == 1
    if lone:  # batch norm cannot train on one image
        assert len(seen) == count - 1 == len(set(seen))
        assert all(len(y) > 1 for _, y in found)
    else:
        assert seen == list(range(count))


def test_the_seed_decides_the_order_and_without_one_there_is_no_shuffling():
    images, labels = numbered(40)

    def order(seed: int | None) -> list[int]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        made = batches(images, labels, 7, normalization=PLAIN, generator=generator)
        return [int(i) for _, y in made for i in y]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(None) == list(range(40))


def test_normalization_is_that_of_float64_numpy():
    made = np.stack([pixels(i, 7, 4) for i in range(9)])  # (N, H, W, C)
    made[..., 1] = 200
    data = data_of(torch.from_numpy(made).permute(0, 3, 1, 2))
    mean, std = data.normalization
    wide = made.astype(np.float64).reshape(-1, 3)
    deviation = np.where(wide.std(0) > 0, wide.std(0), 1.0)
    # Computed in float64 and rounded to float32 once: half a unit in the last place.
    np.testing.assert_allclose(mean.numpy(), wide.mean(0), rtol=1e-7)
    np.testing.assert_allclose(std.numpy(), deviation, rtol=1e-7)
    stream = batches(data.train_images, data.train_labels, 4, normalization=(mean, std))
    found = torch.cat([x for x, _ in stream]).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    # A float32 difference of numbers up to 255, divided by a deviation of 70: 1e-7 x 255 / 70.
    np.testing.assert_allclose(found, (wide - wide.mean(0)) / deviation, atol=1e-6)


def shifted(picture: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """(C, H, W) whose pixel (y, x) is the old (y + down, x + right), black outside."""
    moved = torch.zeros_like(picture)
    _, height, width = picture.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                moved[:, y, x] = picture[:, y + down, x + right]
    return moved


def test_an_augmented_image_is_one_of_its_shifts_or_their_mirror_images():
    pictures = torch.stack([image(i) for i in range(200)])
    found = Augment(padding=1, flip=True)(pictures, torch.Generator().manual_seed(0))
    moves = [(down, right, mirror) for down in (-1, 0, 1) for right in (-1, 0, 1)
             for mirror in (False, True)]  # fmt: skip
    seen = dict.fromkeys(moves, 0)
    for picture, varied in zip(pictures, found, strict=True):
        for down, right, mirror in moves:
            candidate = shifted(picture, down, right)
            seen[down, right, mirror] += torch.equal(
                candidate.flip(2) if mirror else candidate, varied
            )
    assert sum(seen.values()) == 200  # noise: no two moves of an image look the same
    # Eighteen equally likely moves, 11 of each expected; none at all has odds below 1e-3.
    assert min(seen.values()) > 0


def test_without_flip_nothing_is_mirrored_and_without_padding_nothing_is_shifted():
    pictures = torch.stack([image(i) for i in range(50)])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(Augment(padding=0, flip=False)(pictures, generator), pictures)
    mirrored = Augment(padding=0, flip=True)(pictures, generator)
    same = (mirrored == pictures).flatten(1).all(1)
    turned = (mirrored == pictures.flip(3)).flatten(1).all(1)
    assert torch.equal(same, ~turned)
    assert 0 < int(same.sum()) < 50
    before = pictures.clone()
    Augment(padding=2, flip=True)(pictures, generator)
    assert torch.equal(pictures, before)  # the images in memory stay as they are


def test_digits_are_not_mirrored_and_photographs_are_shifted_by_an_eighth():
    assert default_augment(load("digits")) == Augment(padding=1, flip=False)
    photographs = data_of(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert default_augment(photographs) == Augment(padding=4, flip=True)


def test_a_subset_is_some_of_the_training_images_always_the_same():
    images, labels = numbered(50)
    data = ImageData("made", images, labels, images[:5], labels[:5], ("a",))
    some = data.subset(train=20)
    assert len(set(some.train_labels.tolist())) == 20
    assert torch.equal(some.train_images[:, 0, 0, 0].long(), some.train_labels)
    assert torch.equal(some.train_labels, data.subset(train=20).train_labels)
    assert some.train_labels.tolist() != list(range(20))  # data on disk is often sorted
    assert torch.equal(some.test_labels, data.test_labels)
    assert data.subset(train=50) is data
