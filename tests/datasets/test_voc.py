import pytest

from visionkit.datasets import VOCDataset
from visionkit.registry import ConfigError

OBJECT = "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>" \
         "<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"


@pytest.fixture
def write_voc(tmp_path):
    def write(objects):
        """`objects` is a dict of image name -> list of (class, box, difficult)."""
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (tmp_path / folder).mkdir(parents=True)
        for name, entries in objects.items():
            body = "".join(OBJECT.format(name=kind, box=box, difficult=difficult) for kind, box, difficult in entries)
            (tmp_path / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><filename>{name}.png</filename><size><width>50</width><height>40</height></size>{body}</annotation>")
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{name}\n" for name in objects))
        return tmp_path
    return write


def voc(folder, **arguments):
    return VOCDataset(data_root=str(folder), ann_file="ImageSets/Main/train.txt", **arguments)


def test_vocs_inclusive_pixels_counted_from_one_become_our_boxes(write_voc):
    dataset = voc(write_voc({"a": [("dog", (1, 1, 50, 40), 0), ("cat", (11, 21, 11, 21), 1)], "b": []}))
    record = dataset.get_data_info(0)
    dog, cat = record["instances"]
    assert dog["bbox"] == [0, 0, 50, 40]                     # the whole image
    assert dog["area"] == 2000
    assert cat["bbox"] == [10, 20, 11, 21]                   # one pixel
    assert (dog["ignore_flag"], cat["ignore_flag"]) == (0, 1)
    assert (dog["bbox_label"], cat["bbox_label"]) == (11, 7)
    assert (dog["id"], cat["id"]) == (1, 2)
    assert (record["img_id"], record["width"], record["height"]) == (1, 50, 40)
    assert record["img_path"].endswith("JPEGImages/a.png")
    assert dataset.get_data_info(1)["instances"] == []
    assert len(dataset.metainfo["classes"]) == 20
    assert dataset.metainfo["category_ids"][:2] == (1, 2)


def test_classes_choose_objects_and_their_labels(write_voc):
    folder = write_voc({"a": [("dog", (1, 1, 5, 5), 0), ("cat", (1, 1, 9, 9), 0)], "b": [("cat", (2, 2, 4, 4), 0)]})
    dataset = voc(folder, metainfo=dict(classes=("cat",)))
    assert [[(i["bbox_label"], i["id"]) for i in dataset.get_data_info(n)["instances"]] for n in range(2)] == [[(0, 2)], [(0, 3)]]


def test_objects_of_other_names_only_are_an_error_that_lists_them(write_voc):
    folder = write_voc({"a": [("RBC", (1, 1, 5, 5), 0), ("WBC", (1, 1, 5, 5), 0)]})
    with pytest.raises(ConfigError, match=r"metainfo.classes: no object in .*train.txt has one of the classes aeroplane.*called RBC, WBC"):
        voc(folder)


def test_a_misspelt_class_is_an_error_and_a_rare_one_is_not(write_voc):
    folder = write_voc({"a": [("dog", (1, 1, 5, 5), 0), ("person", (1, 1, 5, 5), 0)]})
    with pytest.raises(ConfigError, match=r"no object in .* is called 'persson'. Did you mean 'person'"):
        voc(folder, metainfo=dict(classes=("dog", "persson")))
    assert voc(folder, metainfo=dict(classes=("dog", "sheep"))).metainfo["classes"] == ("dog", "sheep")


def test_a_split_that_names_an_image_without_annotation_is_an_error(write_voc):
    folder = write_voc({"a": [("dog", (1, 1, 5, 5), 0)]})
    (folder / "Annotations" / "a.xml").unlink()
    with pytest.raises(ConfigError, match="ann_file: no annotation of 'a', which .*train.txt lists, at .*a.xml"):
        voc(folder)


@pytest.mark.parametrize("text", ["<annotation>", "<annotation/>"], ids=["not XML", "no size"])
def test_a_broken_annotation_is_named(write_voc, text):
    folder = write_voc({"a": [("dog", (1, 1, 5, 5), 0)]})
    (folder / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(ConfigError, match="a.xml is not a VOC annotation"):
        voc(folder)


def test_a_missing_split_tells_what_the_folder_has(write_voc):
    folder = write_voc({"a": [("dog", (1, 1, 5, 5), 0)]})
    with pytest.raises(ConfigError, match="no split file at .*trainval.txt.* has: train.txt"):
        VOCDataset(data_root=str(folder), ann_file="ImageSets/Main/trainval.txt")
