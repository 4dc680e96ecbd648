import pytest
import torch
from torch import nn

from visionkit.engine.sampling import (
    Taps,
    areas_of_filters,
    dilation_table,
    draw_locations,
    draw_sampling,
    effective_dilation,
    stacked_locations,
    table_lines,
    tap_locations,
    taps_of,
)
from visionkit.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import Sample


def zero_taps(size, stride=1.0, dilation=1):
    """The taps of a fresh 3x3 layer on a map of `size`."""
    layer = DeformConv2dPack(1, 1, 3, padding=dilation, dilation=dilation)
    return Taps("layer", tap_locations(layer, torch.zeros(18, *size)), stride, stride)


def sample(annotations=(), size=(64, 96), scale=1.0):
    shape = (round(size[0] / scale), round(size[1] / scale))
    return Sample(metainfo={"img_id": 0, "img_shape": size, "ori_shape": shape, "scale_factor": (scale, scale),
                            "annotations": [{"bbox": box, "bbox_label": 0} for box in annotations]})


def model(dcn="DeformConv2dPack", **more):
    torch.manual_seed(0)
    deformable = {"dcn": {"type": dcn}, "stage_with_dcn": (False, False, False, True)} if dcn else {}
    return MODELS.build({
        "type": "FasterRCNN", "backbone": {"type": "ResNet", "depth": 18, "norm": "GN", **deformable, **more},
        "neck": {"type": "FPN", "out_channels": 16}, "rpn": {"type": "RPN", "pre_nms": (20, 20), "post_nms": (10, 10)},
        "roi": {"type": "RoIBoxHead", "num_classes": 3, "hidden_channels": (16,)}}).eval()


def packed(annotations=(), size=(64, 96)):
    return {"inputs": torch.randint(0, 256, (3, *size), dtype=torch.uint8), "data_samples": sample(annotations, size)}


def test_fresh_taps_lie_on_the_grid_of_an_ordinary_convolution():
    """Stride 2, padding 2, dilation 2: output (row 1, column 2) is centred on input (2, 4), and its taps are two pixels apart."""
    layer = DeformConv2dPack(1, 1, 3, stride=2, padding=2, dilation=2)
    locations = tap_locations(layer, torch.zeros(18, 4, 5))
    assert locations.shape == (4, 5, 1, 3, 3, 2)
    assert locations[1, 2, 0, 1, 1].tolist() == [4, 2]
    assert locations[1, 2, 0, 0, 2].tolist() == [6, 0]
    assert locations[0, 0, 0, 0, 0].tolist() == [-2, -2]


@pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_the_taps_are_where_the_layer_reads(kind):
    """On maps that hold the coordinates of their pixels, what one tap of the layer reads is where it lies."""
    torch.manual_seed(0)
    layer = kind(2, 2, 3, stride=2, padding=1, offset_groups=2, bias=False).double()
    nn.init.normal_(layer.conv_offset.bias, std=0.3)
    if kind is ModulatedDeformConv2dPack:
        nn.init.constant_(layer.conv_offset.bias[36:], 100.0)                                     # masks of 1
    rows, columns = torch.meshgrid(torch.arange(9).double(), torch.arange(11).double(), indexing="ij")
    for row, column in ((0, 0), (1, 2), (2, 1)):
        locations = tap_locations(layer, layer.conv_offset(torch.stack([columns, rows])[None])[0].detach())
        for axis, maps in enumerate((columns, rows)):        # each group of channels has one map, and each output reads one group
            nn.init.zeros_(layer.weight)
            layer.weight.data[0, 0, row, column] = layer.weight.data[1, 1, row, column] = 1.0
            read = layer(maps.expand(1, 2, -1, -1))[0, :, 2:-1, 2:-1]                             # away from the border
            expected = locations[2:-1, 2:-1, :, row, column, axis].permute(2, 0, 1).double()
            torch.testing.assert_close(read, expected, rtol=0, atol=1e-5)


def test_three_stacked_layers_of_nine_taps_read_at_729_locations():
    """All on a 7x7 grid whose corner is read in one way, whose neighbour in three, and whose centre in 7 * 7."""
    locations = stacked_locations([zero_taps((20, 20), 16.0)] * 3, (160.5, 128.5))                # centre of pixel (10, 8) * 16
    assert locations.shape == (729, 2)
    where, ways = locations.unique(dim=0, return_counts=True)
    grid = {tuple(point): count for point, count in zip(where.tolist(), ways.tolist(), strict=True)}
    assert len(grid) == 49
    assert (grid[112.5, 80.5], grid[128.5, 80.5], grid[160.5, 128.5]) == (1, 3, 49)


def test_taps_outside_the_map_read_nothing():
    """In the corner four of the nine taps of the upper layer lie on the map; only below those are there nine each."""
    assert len(stacked_locations([zero_taps((20, 20))], (0.5, 0.5))) == 9
    assert len(stacked_locations([zero_taps((20, 20))] * 2, (0.5, 0.5))) == 4 * 9


def test_the_taps_of_layers_with_strides_come_together_in_pixels_of_the_input():
    """A layer of stride 2 under one of stride 1: the pixels of the upper map are 32 apart, those that the lower reads 16."""
    lower = tap_locations(DeformConv2dPack(1, 1, 3, stride=2, padding=1), torch.zeros(18, 10, 10))
    upper = tap_locations(DeformConv2dPack(1, 1, 3, padding=1), torch.zeros(18, 10, 10))
    locations = stacked_locations([Taps("lower", lower, 16.0, 32.0), Taps("upper", upper, 32.0, 32.0)], (170, 150))
    assert locations[:, 0].unique().tolist() == [160.5 + step * 16 for step in (-3, -2, -1, 0, 1, 2, 3)]
    assert locations[:, 1].mean().item() == 160.5


def test_effective_dilation_is_the_mean_distance_of_neighbours():
    assert torch.equal(effective_dilation(zero_taps((4, 5), dilation=2).locations), torch.full((4, 5), 2.0))
    layer = DeformConv2dPack(1, 1, 3, padding=1)
    offsets = torch.zeros(18, 1, 1)
    offsets[1] = -2.0                                        # dx of the first tap: one of twelve distances is 3, another sqrt(1 + 4)
    dilation = effective_dilation(tap_locations(layer, offsets))
    assert dilation.item() == pytest.approx((10 + 3 + 5**0.5) / 12)


def test_filters_are_sorted_by_the_smallest_object_under_their_centre():
    """Halved images: what is 40 wide there is 20 wide here. Columns 0 and 1 of the map see the large box, and a small one on top."""
    layer = zero_taps((4, 6), 16.0)
    areas = areas_of_filters(layer, sample([(0, 0, 100, 128), (0, 0, 30, 30), (100, 0, 160, 60)], (64, 80), scale=0.5), (32, 96))
    small, medium, large, background, padding = 0, 1, 2, 3, -1
    assert areas[0].tolist() == [small, large, large, large, medium, padding]
    assert areas[3].tolist() == [large, large, large, large, background, padding]


@pytest.mark.parametrize("dcn", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_a_fresh_network_is_measured_as_an_ordinary_one(dcn):
    network = model(dcn)
    taps = taps_of(network, packed())
    assert [one.name for one in taps] == [name for name, _ in network.named_modules() if name.endswith("conv2") and ".layer4." in name]
    assert [(one.stride, one.out_stride) for one in taps] == [(32.0, 32.0)] * 2
    table = dilation_table(network, [packed([(0, 0, 40, 40)]), packed()])
    for areas in table.values():
        assert set(areas) == {"medium", "background"}
        assert areas["medium"] == (1.0, 0.0, 4)              # centres 0.5 and 32.5 along both axes
        assert areas["background"] == (1.0, 0.0, 8)
    assert table_lines(table).splitlines()[1].split()[1:] == ["-", "1.00", "±", "0.00", "-", "1.00", "±", "0.00"]


def test_a_network_without_deformable_layers_says_what_to_set():
    with pytest.raises(ConfigError, match="model.backbone: .*stage_with_dcn"):
        taps_of(model(None), packed())


def test_the_picture_has_a_dot_at_each_location():
    image = torch.zeros(480, 640, 3, dtype=torch.uint8).numpy()
    picture = draw_locations(image, torch.tensor([[100.5, 50.5], [600.5, 400.5]]), (320.5, 240.5))
    assert picture.shape == image.shape
    assert not image.any()
    assert picture[50, 100].tolist() == picture[400, 600].tolist() == [230, 40, 40]
    assert picture[240, 320].tolist() == [30, 120, 30]
    assert (picture.any(2).sum()) < 1000


def test_a_point_beside_the_image_is_refused():
    one = packed()
    image = one["inputs"].permute(1, 2, 0).numpy()
    with pytest.raises(ConfigError, match="0 to 95 and 0 to 63; got 96 10"):
        draw_sampling(model(), one, image, (96, 10))
    with pytest.raises(ConfigError, match="--layers is at least 1"):
        draw_sampling(model(), one, image, (9, 10), depth=0)
    assert draw_sampling(model(), one, image, (40, 40), depth=1)[1] == 9
