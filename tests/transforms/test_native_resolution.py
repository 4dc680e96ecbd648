import numpy as np
import pytest
import torch
from PIL import Image

from visionkit.models.base import NativeResolutionPreprocessor
from visionkit.registry import TRANSFORMS
from visionkit.structures import Sample
from visionkit.testing import example_results
from visionkit.transforms import RandomNativeResize, ResizeToTokenLimit, build_pipeline


@pytest.mark.parametrize("height, width, resized, grid", [
    (28, 28, (28, 28), (2, 2)),
    (100, 333, (100, 333), (8, 24)),             # padded to 112 x 336
    (2000, 3000, (734, 1101), (54, 80)),         # 142 * 214 = 30388 patches: by sqrt(4096 / 30388) = 0.3671; padded to 756 x 1120
], ids=["28x28", "100x333", "2000x3000"])
def test_an_image_has_as_many_tokens_as_worked_out_by_hand(height, width, resized, grid):
    """Spec 10, item 6: 1, 48 and 1080 tokens."""
    image = np.zeros((height, width, 3), np.uint8)
    packed = build_pipeline([{"type": "ResizeToTokenLimit"}, {"type": "PackSample"}])({"img": image, "ori_shape": (height, width)})
    assert packed["inputs"].shape[1:] == resized
    (padded,) = NativeResolutionPreprocessor()({"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]})["images"].images
    assert (padded.shape[1] // 14, padded.shape[2] // 14) == grid
    assert grid[0] * grid[1] // 4 == {28: 1, 100: 48, 2000: 1080}[height]


def test_an_image_over_the_limit_is_what_pillow_makes_of_it_and_boxes_and_masks_go_along():
    results = example_results(size=(90, 150)) | {"scale_factor": (2.0, 2.0)}
    boxes, masks, image = results["gt_bboxes"], results["gt_masks"], results["img"]
    done = ResizeToTokenLimit(patch_size=10, limit=35).transform(dict(results))        # 15 * 9 = 135 patches: by 0.5092
    assert done["img"].shape == (45, 76, 3)
    assert done["img_shape"] == (45, 76)
    assert np.array_equal(done["img"], np.array(Image.fromarray(image).resize((76, 45), Image.BICUBIC)))
    assert done["scale_factor"] == pytest.approx((2 * 76 / 150, 2 * 45 / 90))
    np.testing.assert_allclose(done["gt_bboxes"], boxes * [76 / 150, 0.5, 76 / 150, 0.5], rtol=1e-6)
    assert done["gt_bboxes"].dtype == np.float32
    assert done["gt_masks"].shape == (len(masks), 45, 76)
    assert done["gt_masks"].sum() == pytest.approx(masks.sum() * 76 / 150 / 2, rel=0.2)


def test_an_image_within_the_limit_stays_as_it_is():
    results = example_results(size=(90, 150))
    done = ResizeToTokenLimit(patch_size=10, limit=135).transform(dict(results))
    assert all(done[key] is results[key] for key in results)


def test_a_side_of_512_patches_is_an_error():
    for width in (7168, 7141):                   # 7141 pixels are 510.07 patches, which are padded to 512
        with pytest.raises(ValueError, match=f"28x{width} pixels has a side of 512 patches"):
            ResizeToTokenLimit().transform({"img": np.zeros((28, width, 3), np.uint8)})
    ResizeToTokenLimit().transform({"img": np.zeros((28, 7140, 3), np.uint8)})


def test_an_image_never_vanishes_and_one_that_is_no_photograph_is_refused():
    assert ResizeToTokenLimit(limit=1).size(14, 7000) == (1, 313)
    for image in (np.zeros((90, 90, 3), np.float32), np.zeros((90, 90, 1), np.uint8), np.zeros((90, 90), np.uint8)):
        with pytest.raises(ValueError, match=r"images \[h, w, 3\] of uint8, got .* right after LoadImageFromFile"):
            ResizeToTokenLimit(limit=4).transform({"img": image})


def test_random_sizes_are_all_multiples_from_low_to_high_and_height_and_width_do_not_depend_on_each_other():
    np.random.seed(0)
    resize = RandomNativeResize(multiple=28, low=56, high=112)
    seen = {resize.transform({"img": np.zeros((32, 32, 3), np.uint8)})["img"].shape[:2] for _ in range(100)}
    assert seen == {(height, width) for height in (56, 84, 112) for width in (56, 84, 112)}


@pytest.mark.parametrize("config, said", [
    (dict(type="RandomNativeResize", low=50), "low and high are multiples of multiple"),
    (dict(type="RandomNativeResize", low=112, high=56), "low and high are multiples of multiple"),
    (dict(type="RandomNativeResize", interpolation="cubic"), "interpolation of the backend 'cv2' must be one of"),
    (dict(type="ResizeToTokenLimit", limit=0), "patch_size, limit and merge are 1 or more")])
def test_what_makes_no_sense_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        TRANSFORMS.build(config)


def test_the_preprocessor_pads_with_black_and_then_normalises():
    images = [np.full((3, 20, 30), 255, np.uint8), np.full((3, 28, 28), 0, np.uint8)]
    data = {"inputs": [torch.from_numpy(image) for image in images], "data_samples": [Sample(), Sample()]}
    first, second = NativeResolutionPreprocessor(multiple=14)(data)["images"].images
    assert first.shape == (3, 28, 42)
    assert (first[:, :20, :30] == 1).all()
    assert (first[:, 20:] == -1).all()
    assert (first[:, :, 30:] == -1).all()
    assert second.shape == (3, 28, 28)
    assert (second == -1).all()


def test_the_control_gives_each_sample_the_image_of_the_next():
    data = {"inputs": [torch.full((3, 28, 28 * (index + 1)), float(index)) for index in range(3)],
            "data_samples": [Sample(metainfo={"img_id": index}) for index in range(3)]}
    done = NativeResolutionPreprocessor(mean=(0, 0, 0), std=(1, 1, 1), exchange_images=True)(data)
    assert [image.mean().item() for image in done["images"].images] == [1, 2, 0]
    assert [sample.img_id for sample in done["samples"]] == [0, 1, 2]
