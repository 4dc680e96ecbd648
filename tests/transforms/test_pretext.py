"""What is promised of puzzles: right answers, and no way to them but by what is in the picture."""
import numpy as np
import pytest
import torch

from visionkit.registry import TRANSFORMS, ConfigError
from visionkit.structures import ImageList
from visionkit.transforms import FourRotations, JigsawTiles, PatchGrid
from visionkit.transforms.pretext import cut_out, distant_permutations, drop_channels, hamming_distances, project_colors, standardise


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(batch, side):
    """[B, 3, side, side] whose pixels say where they are: row, column, image."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, image)]) for image in range(batch)]).float()


def small_grid(**changes):
    return PatchGrid(**{"patch": 12, "gap": 6, "jitter": 2, "color": None, "resampled": 0, "least_pixels": 16} | changes)


# ---------------------------------------------------------------------------------------------------------------- rotations

@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_label_k_is_numpys_rot90_to_the_bit_and_the_batch_is_balanced(order):
    images = noise(3, 3, 5, 5).contiguous(memory_format=order)
    views, labels = FourRotations()(images)
    assert labels.tolist() == [[0, 1, 2, 3]] * 3
    assert labels.flatten().bincount().tolist() == [3, 3, 3, 3]
    for image, turned in zip(images, views, strict=True):
        for k, view in enumerate(turned):
            assert np.array_equal(view.numpy(), np.rot90(image.numpy(), k, axes=(1, 2)))
    assert views.flatten(0, 1).is_contiguous(memory_format=order)


def test_images_that_are_not_square_are_told_what_to_do():
    with pytest.raises(ValueError, match=r"got 24x32 pixels; put dict\(type='RandomCrop', size=\(24, 24\)\)"):
        FourRotations()(noise(1, 3, 24, 32))


def test_images_of_their_own_shapes_are_turned_exactly_one_after_the_other():
    square, wide = noise(3, 8, 8), noise(3, 4, 12)
    views, labels = FourRotations()(ImageList((square, wide)))
    assert [tuple(view.shape[1:]) for view in views.images] == [(8, 8)] * 4 + [(4, 12), (12, 4)] * 2
    assert labels.tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(torch.stack(views.images[:4])[None], FourRotations()(square[None]).views)
    for turned, view in enumerate(views.images[4:]):
        for _ in range(4 - turned):
            view = view.rot90(1, (1, 2))
        assert torch.equal(view, wide)


# ------------------------------------------------------------------------------------------------------------------ patches

@pytest.mark.parametrize("patch, gap, jitter, side", [(96, 48, 7, 400), (64, 21, 10, 255), (12, 6, 2, 70)],
                         ids=["Doersch", "a crop of 255", "small"])
def test_patches_never_overlap_and_keep_the_promised_gap(patch, gap, jitter, side):
    grid = PatchGrid(patch=patch, gap=gap, jitter=jitter)
    offsets = grid.draw_offsets(torch.empty(1000, 3, side, side))
    assert offsets.min() >= 0
    assert offsets.max() <= side - patch
    least, mean = grid.gaps(offsets)
    print(f"patch {patch}, gap {gap}, jitter {jitter}: least gap {least:.0f}, mean {mean:.2f} pixels")
    assert grid.least_gap == gap - 2 * jitter > 0
    assert least == grid.least_gap                                                     # both met, and reached in 12000 gaps
    assert mean == pytest.approx(gap, abs=0.2)
    y, x = offsets[:100].unbind(-1)
    apart = torch.maximum((y[:, :, None] - y[:, None]).abs(), (x[:, :, None] - x[:, None]).abs())[:, ~torch.eye(9, dtype=torch.bool)]
    assert apart.min() >= patch + grid.least_gap                                       # every two of the nine


def test_the_grid_stands_anywhere_in_the_image():
    grid = small_grid()
    assert grid.least_side == 52
    corners = grid.draw_offsets(torch.empty(400, 3, 60, 56))[:, 0]
    assert corners.amin(0).tolist() == [0, 0]
    assert corners.amax(0).tolist() == [60 - 52 + 4, 56 - 52 + 4]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_patch_is_what_lies_at_its_offset(order):
    images = places(2, 56).contiguous(memory_format=order)
    patches, offsets = small_grid()(images)
    for image in range(2):
        for index, (y, x) in enumerate(offsets[image].tolist()):
            assert torch.equal(patches[image, index], images[image, :, y:y + 12, x:x + 12])
    assert patches.flatten(0, 1).is_contiguous(memory_format=order)
    assert (offsets[:, 3:, 0] > offsets[:, :-3, 0]).all()                              # raster order
    assert (offsets[:, [1, 2, 4, 5, 7, 8], 1] > offsets[:, [0, 1, 3, 4, 6, 7], 1]).all()


def test_windows_reach_the_last_pixel_and_no_further():
    images = places(1, 8)
    assert torch.equal(cut_out(images, torch.tensor([[[5, 4]]]), 3)[0, 0], images[0, :, 5:8, 4:7])
    with pytest.raises(IndexError):
        cut_out(images, torch.tensor([[[6, 0]]]), 3)


def test_dropped_channels_are_noise_of_a_hundredth_of_the_one_that_stays():
    patches = noise(20, 9, 3, 16, 16) * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1) + 5
    dropped = drop_channels(patches)
    stays = (dropped == patches).all(-1).all(-1)                                       # [B, 9, 3]
    assert (stays.sum(-1) == 1).all()
    assert (stays.sum((0, 1)) > 30).all()                                              # of 180: each channel has its turn, patch by patch
    assert (stays.float().std(1).sum(-1) > 0).all()                                    # and not the same in all patches of an image
    kept = patches[stays].view(20, 9, 256).std(-1, correction=0)
    others = dropped[~stays].view(20, 9, 512)
    ratio = (others.square().mean(-1).sqrt() / kept).mean()
    assert ratio.item() == pytest.approx(0.01, rel=0.02)


def test_projection_leaves_no_cue_of_colours_that_a_lens_shifted():
    """A grey picture whose green is shifted outwards, as a lens does it: at edges, green against magenta tells the direction."""
    grey = noise(2, 1, 56, 56).cumsum(-1) * 0.2
    shifted = torch.cat([grey, grey.roll(1, -1), grey], 1)
    a = torch.tensor([-1.0, 2.0, -1.0]).view(3, 1, 1)
    assert (small_grid()(shifted).patches * a).sum(2).abs().max() > 0.1                # the cue
    patches = small_grid(color="project")(shifted).patches
    assert (patches * a).sum(2).abs().max() < 1e-5
    colour = torch.tensor([3.0, 6.0, 9.0]).view(3, 1, 1)                               # v.a = 0 stays as it is, a itself becomes 0
    torch.testing.assert_close(project_colors(colour), colour)
    torch.testing.assert_close(project_colors(a), torch.zeros(3, 1, 1))


def test_a_third_of_the_patches_is_resampled_as_interpolation_does_it():
    grid = small_grid(resampled=1 / 3)
    images = noise(4, 3, 56, 56)
    patches, offsets = grid(images)
    plain = cut_out(images, offsets, 12)
    changed = (patches != plain).flatten(2).any(-1)
    assert 8 <= changed.sum() <= 12                                                    # of 36; one of 12 pixels a side is shrunk to 12
    sides = torch.arange(4, 13)
    for image, index in changed.nonzero().tolist():
        one = plain[image, index][None]
        ways = [torch.nn.functional.interpolate(torch.nn.functional.interpolate(one, int(side), mode="bilinear", antialias=True),
                                                12, mode="bilinear") for side in sides]
        assert min((way[0] - patches[image, index]).abs().max() for way in ways) < 1e-5
    assert torch.equal(grid.blur[-1], torch.eye(12))


@pytest.mark.parametrize("changes, message", [({"gap": 4}, "gap must be more than 4"), ({"color": "grey"}, "'drop', 'project' or None"),
                                              ({"least_pixels": 200}, "patch \\* patch = 144"), ({"resampled": 2}, "a part, 0 to 1")])
def test_a_grid_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TRANSFORMS.build({"type": "PatchGrid", "patch": 12, "gap": 6, "jitter": 2, "least_pixels": 16} | changes)


def test_images_that_do_not_hold_the_puzzle_are_refused():
    with pytest.raises(ValueError, match="at least 52x52 pixels, got 51x60"):
        small_grid()(noise(1, 3, 51, 60))
    with pytest.raises(ValueError, match="at least 39x39, got 38x60"):
        JigsawTiles(tile=12, num_permutations=2)(noise(1, 3, 38, 60))
    with pytest.raises(ValueError, match="three channels, got 1"):
        small_grid(color="drop")(noise(1, 1, 56, 56))


# -------------------------------------------------------------------------------------------------------------------- tiles

def test_a_thousand_permutations_differ_and_differ_much():
    permutations = distant_permutations(1000)
    assert permutations.shape == (1000, 9)
    assert permutations.sort(-1).values.eq(torch.arange(9)).all()
    assert len(permutations.unique(dim=0)) == 1000
    least, mean = hamming_distances(permutations)
    print(f"1000 permutations: least Hamming distance {least:.0f}, mean {mean:.3f}")
    assert least >= 5
    assert mean > 8
    assert torch.equal(permutations, distant_permutations(1000))
    assert not torch.equal(permutations[:100], distant_permutations(100, seed=1))


def test_each_choice_is_as_far_from_those_before_it_as_any_permutation_is():
    """Against all 9! by a slow way, for the first twenty."""
    chosen = distant_permutations(20, seed=3)
    others = distant_permutations(400, seed=4)                                         # some that might have been chosen
    for count in range(1, 20):
        best = (others[:, None] != chosen[:count]).sum(-1).min(1).values.max()
        assert (chosen[count] != chosen[:count]).sum(-1).min() >= best


def test_hamming_distances_by_hand():
    least, mean = hamming_distances(torch.tensor([[0, 1, 2], [0, 2, 1], [1, 2, 0]]))
    assert (least, mean) == (2, pytest.approx((2 + 3 + 2) / 3))


@pytest.mark.parametrize("count", [1, 362881])
def test_too_few_or_too_many_permutations_are_refused(count):
    with pytest.raises(ConfigError, match=r"2 to 9! = 362880"):
        TRANSFORMS.build({"type": "JigsawTiles", "num_permutations": count})


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_tile_lies_in_its_cell_with_mean_0_and_deviation_1(order):
    puzzle = JigsawTiles(tile=12, num_permutations=20, per_image=5, grey=0)
    images = (noise(40, 3, 46, 49) * 3 + 7).contiguous(memory_format=order)
    tiles, orders, labels, offsets = puzzle(images)
    assert tiles.flatten(0, 1).is_contiguous(memory_format=order)
    assert tiles.mean((-2, -1)).abs().max() < 1e-5
    assert (tiles.std((-2, -1), correction=0) - 1).abs().max() < 1e-5
    cells = torch.tensor([[i // 3 * 15, i % 3 * 16] for i in range(9)])
    moved = offsets - cells
    assert moved.amin((0, 1)).tolist() == [0, 0]
    assert moved.amax((0, 1)).tolist() == [3, 4]                                       # cells of 15x16
    torch.testing.assert_close(tiles, standardise(cut_out(images, offsets, 12)))
    assert orders.shape == (40, 5, 9)
    assert labels.unique().tolist() == list(range(20))
    assert torch.equal(orders, puzzle.permutations[labels])


def test_a_tile_without_contrast_becomes_zero():
    tiles = torch.full((1, 9, 3, 8, 8), 1.7)
    tiles[0, 0, 0] = noise(8, 8)
    even = standardise(tiles)
    assert even[0, 0, 0].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert not even[0, 1:].any()
    assert not even[0, 0, 1:].any()


def test_a_part_of_the_images_loses_its_colour():
    tiles = JigsawTiles(tile=12, num_permutations=2, grey=0.3)(noise(300, 3, 45, 45)).tiles
    grey = (tiles[:, :, :1] == tiles).flatten(1).all(1)
    assert 60 <= grey.sum() <= 120                                                     # 90 are expected; +-30 is nearly four deviations
    partly = (tiles[:, :, :1] == tiles).all(2).all(-1).all(-1).any(1)
    assert torch.equal(grey, partly)                                                   # a whole image, or none of its tiles
    noisy = noise(1, 3, 45, 45)
    puzzle = JigsawTiles(tile=12, num_permutations=2, grey=1.0).eval()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    found = puzzle(noisy)
    luma = (cut_out(noisy, found.offsets, 12) * weights).sum(2, keepdim=True)
    torch.testing.assert_close(found.tiles, standardise(luma).expand(-1, -1, 3, -1, -1))


def test_the_permutations_are_saved_and_restored():
    puzzle, other = (JigsawTiles(tile=12, num_permutations=30, seed=seed) for seed in (0, 1))
    mine = puzzle.permutations.clone()
    assert not torch.equal(mine, other.permutations)
    other.load_state_dict(puzzle.state_dict(), strict=True)
    assert torch.equal(other.permutations, mine)
    assert torch.equal(JigsawTiles(tile=12, num_permutations=30, seed=1).permutations, distant_permutations(30, 1))    # not what was loaded


# --------------------------------------------------------------------------------------------------------------------- draws

@pytest.mark.parametrize("build", [lambda: small_grid(color="drop", resampled=0.5), lambda: JigsawTiles(tile=12, num_permutations=50)],
                         ids=["PatchGrid", "JigsawTiles"])
def test_training_draws_from_torchs_generator_and_validation_always_the_same(build):
    puzzle, images = build(), noise(4, 3, 56, 56)

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    torch.manual_seed(5)
    first, second = puzzle(images), puzzle(images)
    torch.manual_seed(5)
    assert same(puzzle(images), first)
    assert not same(second, first)
    puzzle.eval()
    before = torch.get_rng_state()
    assert same(puzzle(images), puzzle(images))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("puzzle", [FourRotations(), small_grid(color="drop", resampled=0.5), small_grid(color="project"),
                                    JigsawTiles(tile=12, num_permutations=5)], ids=["rotations", "drop", "project", "jigsaw"])
def test_puzzles_do_not_change_the_images_and_take_none_and_autocast(puzzle):
    images = noise(2, 3, 56, 56)
    given = images.clone()
    with torch.autocast("cpu", torch.bfloat16):
        views = puzzle(given)[0]
    assert torch.equal(given, images)
    assert views.dtype == torch.float32
    assert puzzle(images[:0])[0].shape == (0, *views.shape[1:])
