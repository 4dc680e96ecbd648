import io
import os
import pickle
import pickletools

import numpy as np
import pytest
from torch.utils.data import DataLoader

from visionkit.datasets import CIFAR
from visionkit.datasets.cifar import read_pickle
from visionkit.registry import ConfigError

TEN = [f"c{i}" for i in range(10)]
HUNDRED, TWENTY = [f"f{i}" for i in range(100)], [f"s{i}" for i in range(20)]
PIPELINE = [dict(type="LoadImageFromFile"), dict(type="PackSample")]


def batch(count, seed, classes=10):
    """uint8 [N, 3072] as CIFAR's files have them, and N labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, classes, count).tolist()


def python_2(content):
    """`content` pickled as a Python 2 does it: text and the bytes of arrays as 8-bit strings, and numpy by its old address."""
    out = io.BytesIO()
    out.write(b"\x80\x02")

    def put(value):
        if isinstance(value, dict):
            out.write(b"}(")
            for key, item in value.items():
                put(key)
                put(item)
            out.write(b"u")
        elif isinstance(value, list):
            out.write(b"](")
            for item in value:
                put(item)
            out.write(b"e")
        elif isinstance(value, (str, bytes)):
            value = value.encode() if isinstance(value, str) else value
            out.write(b"T" + len(value).to_bytes(4, "little") + value)
        elif isinstance(value, int):
            out.write(b"J" + value.to_bytes(4, "little"))
        else:
            out.write(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt" + b"R(K\x01(")
            for side in value.shape:
                put(side)
            out.write(b"tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
            put(value.tobytes())
            out.write(b"tb")
    put(content)
    out.write(b".")
    pickletools.dis(out.getvalue(), out=io.StringIO())       # it is a well-formed pickle
    return out.getvalue()


def python_3(content):
    return pickle.dumps(content, protocol=2)


def write_ten(folder, form):
    for index in range(5):
        images, labels = batch(4, index)
        _write(folder, f"data_batch_{index + 1}", images, labels, form)
    _write(folder, "test_batch", *batch(3, 9), form)
    if form == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    else:
        (folder / "batches.meta").write_bytes(form({"num_cases_per_batch": 4, "label_names": TEN, "num_vis": 3072}))


def _write(folder, name, images, labels, form):
    if form == "binary":
        (folder / f"{name}.bin").write_bytes(np.concatenate([np.array(labels, np.uint8)[:, None], images], 1).tobytes())
    else:
        (folder / name).write_bytes(form({"batch_label": name, "labels": labels, "data": images, "filenames": ["x.png"] * len(labels)}))


@pytest.mark.parametrize("form", ["binary", python_2, python_3], ids=["binary", "python 2", "python 3"])
@pytest.mark.parametrize("split, seeds, count", [("train", range(5), 4), ("test", [9], 3)])
def test_cifar_10_is_read_in_every_form(tmp_path, form, split, seeds, count):
    write_ten(tmp_path, form)
    dataset = CIFAR(data_root=str(tmp_path), split=split, pipeline=PIPELINE)
    images, labels = (np.concatenate(part) for part in zip(*(batch(count, seed) for seed in seeds), strict=True))
    assert [dataset.get_data_info(i)["gt_label"] for i in range(len(dataset))] == labels.tolist()
    assert dataset.metainfo["classes"] == tuple(TEN)
    for row, flat in enumerate(images):
        item = dataset[row]
        assert (item["inputs"].numpy() == flat.reshape(3, 32, 32)).all()                 # red, green, blue, each row by row
        assert item["data_samples"].gt_label.item() == labels[row]
        assert item["data_samples"].img_id == row
    assert dataset.get_cat_ids(1) == [labels[1]]


@pytest.mark.parametrize("form", ["binary", python_2])
@pytest.mark.parametrize("coarse", [False, True])
def test_cifar_100_has_fine_and_coarse_labels(tmp_path, form, coarse):
    images, fine = batch(6, 0, 100)
    supers = [label // 5 for label in fine]
    for name in ("train", "test"):
        if form == "binary":
            rows = np.concatenate([np.array([supers, fine], np.uint8).T, images], 1)
            (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            (tmp_path / name).write_bytes(form({"data": images, "fine_labels": fine, "coarse_labels": supers}))
    if form == "binary":
        (tmp_path / "fine_label_names.txt").write_text("\n".join(HUNDRED))
        (tmp_path / "coarse_label_names.txt").write_text("\n".join(TWENTY))
    else:
        (tmp_path / "meta").write_bytes(form({"fine_label_names": HUNDRED, "coarse_label_names": TWENTY}))
    dataset = CIFAR(data_root=str(tmp_path), coarse=coarse)
    assert dataset.metainfo["classes"] == tuple(TWENTY if coarse else HUNDRED)
    assert [dataset.get_data_info(i)["gt_label"] for i in range(6)] == (supers if coarse else fine)
    assert (dataset.get_data_info(3)["img"] == images[3].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_classes_choose_images_and_labels(tmp_path):
    write_ten(tmp_path, "binary")
    labels = np.concatenate([batch(4, seed)[1] for seed in range(5)])
    wanted = [int(max(labels)), int(min(labels))]
    dataset = CIFAR(data_root=str(tmp_path), metainfo=dict(classes=[TEN[label] for label in wanted]))
    records = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [one["img_id"] for one in records] == [row for row in range(20) if labels[row] in wanted]
    assert all(wanted[one["gt_label"]] == labels[one["img_id"]] for one in records)
    assert (records[-1]["img"] == dataset.images[records[-1]["img_id"]]).all()


def test_a_transform_that_writes_into_its_image_does_not_change_the_data_set(tmp_path):
    write_ten(tmp_path, "binary")
    dataset = CIFAR(data_root=str(tmp_path))
    before = dataset.images.copy()
    dataset.get_data_info(0)["img"][:] = 0
    assert (dataset.images == before).all()


def test_forked_workers_share_the_images(tmp_path):
    write_ten(tmp_path, "binary")
    dataset = CIFAR(data_root=str(tmp_path), pipeline=[dict(type="LoadImageFromFile"), lambda one: (one["img_id"], os.getpid())])
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    seen = list(loader)
    assert [img_id for img_id, _ in seen] == list(range(20))
    assert len({pid for _, pid in seen} - {os.getpid()}) == 2
    assert dataset.data_bytes.nbytes < dataset.images.nbytes / 10                       # the records, which are read bit by bit, hold none
    assert dataset.images.flags.c_contiguous


# --------------------------------------------------------------------------------------------------------------------- pickles

class Evil:
    def __reduce__(self):
        return os.system, ("touch {}",)


def evil(path, deep):
    """A pickle that creates the file `path` when it is loaded by one who trusts it."""
    Evil.__reduce__ = lambda self: (os.system, (f"touch {path}",))
    return pickle.dumps({"data": [Evil()] if deep else Evil()}, protocol=2)


@pytest.mark.parametrize("deep", [False, True])
def test_what_an_evil_pickle_wants_is_named_and_not_run(tmp_path, deep):
    write_ten(tmp_path, python_2)
    data = evil(tmp_path / "run", deep)
    (tmp_path / "data_batch_3").write_bytes(data)
    with pytest.raises(ConfigError, match=r"data_batch_3 is refused: .* but it wants (posix|nt).system. Nothing in it was run"):
        CIFAR(data_root=str(tmp_path))
    assert not (tmp_path / "run").exists()
    pickle.loads(data)                                       # the file is evil indeed
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [b"cbuiltins\neval\n", b"c__builtin__\ngetattr\n", b"cnumpy\nload\n", b"ccopyreg\n_reconstructor\n",
                                   b"cnumpy\nndarray.tofile\n", b"\x8c\x05numpy\x8c\x11ndarray.__class__\x93"])
def test_any_other_global_is_refused(tmp_path, names):
    file = tmp_path / "batch"
    file.write_bytes(b"\x80\x04" + names + b".")
    with pytest.raises(ConfigError, match="is refused: .* but it wants "):
        read_pickle(str(file))


@pytest.mark.parametrize("data, said", [
    (pickle.dumps([1, 2], protocol=2), "is refused: .* it holds a list"),
    (pickle.dumps({"data": np.zeros(3)}, protocol=2), "is refused: .*array of type"),
    (python_2({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}), r"not a batch of CIFAR: wanted `data`, uint8 \[N, 3072\]"),
    (python_2({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "not a batch of CIFAR"),
    (python_2({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})[:900], "cannot be read, it may be damaged|is refused"),
    (b"cnumpy\ndtype\n}b.", "cannot be read, it may be damaged"),                        # state for a stand-in itself
])
def test_a_file_of_another_kind_is_an_error_that_names_it(tmp_path, data, said):
    write_ten(tmp_path, python_2)
    (tmp_path / "data_batch_1").write_bytes(data)
    with pytest.raises(ConfigError, match=f"data_root: .*data_batch_1.* {said}|data_batch_1 {said}"):
        CIFAR(data_root=str(tmp_path))


def test_a_binary_file_that_was_cut_is_an_error(tmp_path):
    write_ten(tmp_path, "binary")
    file = tmp_path / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="data_batch_2.bin has 12291 bytes, which is no whole number of records of 3073"):
        CIFAR(data_root=str(tmp_path))


@pytest.mark.parametrize("arguments, said", [
    (dict(split="val"), "split: split is 'train' or 'test', got 'val'"),
    (dict(coarse=True), "coarse: only CIFAR-100 has coarse classes"),
    (dict(metainfo=dict(classes=("c10",))), "metainfo.classes: .* has no class 'c10'. Did you mean 'c1' or 'c0'"),
    (dict(data_root="nowhere"), "data_root: no folder at .*nowhere"),
])
def test_wrong_choices_are_refused(tmp_path, arguments, said):
    write_ten(tmp_path, "binary")
    with pytest.raises(ConfigError, match=said):
        CIFAR(**{"data_root": str(tmp_path), **arguments})


def test_a_missing_file_and_an_empty_folder_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"holds none of data_batch_1.bin, data_batch_1, train.bin, train,.* it has: nothing"):
        CIFAR(data_root=str(tmp_path))
    write_ten(tmp_path, "binary")
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(ConfigError, match="no file of the train split at .*data_batch_4.bin"):
        CIFAR(data_root=str(tmp_path))
