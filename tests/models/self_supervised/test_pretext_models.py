"""What rotation, relative patch location and jigsaw have in common: puzzles of whole images, a trunk, answers."""
import copy
import io
import math
from typing import NamedTuple

import pytest
import torch

from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, ImageList, Sample
from visionkit.testing.module import check_gradients, check_state_dict

TRUNK = {"type": "ConvBlocks", "channels": (8, 16), "convs_per_block": 1}
CONFIGS = {
    "rotation": {"type": "Rotation", "backbone": TRUNK},
    "relative patch": {"type": "RelativePatch", "backbone": TRUNK,
                       "head": {"type": "RelativePatchHead", "hidden_channels": 64, "dropout": 0.0, "norm_momentum": 0.1},
                       "puzzle": {"type": "PatchGrid", "patch": 12, "gap": 4, "jitter": 1, "color": None, "resampled": 0,
                                  "least_pixels": 36}},
    "jigsaw": {"type": "Jigsaw", "backbone": TRUNK,
               "head": {"type": "JigsawHead", "tile_channels": 32, "hidden_channels": 64, "dropout": 0.0},
               "puzzle": {"type": "JigsawTiles", "tile": 12, "num_permutations": 16, "per_image": 8, "grey": 0.0}},
}
ANSWERS = {"rotation": (4, 4), "relative patch": (8, 8), "jigsaw": (8, 16)}             # puzzles an image, answers to choose from
SIDE = 48
every_model = pytest.mark.parametrize("name", CONFIGS)
several_cells = pytest.mark.parametrize("pool", [1, 3])      # maps of 3x3: their mean, or all there is


def build(name, **changes):
    torch.manual_seed(0)
    return MODELS.build(CONFIGS[name] | changes)


def cells_of(maps, pool):
    assert maps.shape[2:] == (3, 3)
    return maps.mean((2, 3)) if pool == 1 else maps.flatten(1)


def samples(count):
    return [Sample(metainfo={"img_id": index}) for index in range(count)]


def scores(model, images):
    model.eval()
    with torch.no_grad():
        return [sample.pretext.scores for sample in model(images, samples(len(images)), mode="predict")]


@every_model
def test_the_loss_is_finite_starts_at_chance_and_reaches_every_parameter(name, pictures):
    model, images = build(name), pictures(4, SIDE)
    losses = model.loss(images, samples(4))
    assert set(losses) == {"loss_pretext", "pretext_accuracy"}
    chance = torch.tensor(float(ANSWERS[name][1])).log()
    assert losses["loss_pretext"].item() == pytest.approx(chance.item(), rel=0.1)
    assert 0 <= losses["pretext_accuracy"] <= 1
    assert not losses["pretext_accuracy"].requires_grad
    total, log = model.parse_losses(losses)
    assert total.item() == losses["loss_pretext"].item()                               # accuracy is logged, not learned from
    assert "pretext_accuracy" in log
    check_gradients(model, lambda model: model.loss(images, samples(4))["loss_pretext"])
    with torch.autocast("cpu", torch.bfloat16):
        check_gradients(model, lambda model: model.loss(images, samples(4))["loss_pretext"])
        assert model(images).logits.dtype == torch.float32


@every_model
def test_predictions_have_a_row_a_puzzle_and_are_the_same_every_time(name, pictures):
    model, images = build(name).eval(), pictures(3, SIDE)
    found = model(images, samples(3), mode="predict")
    puzzles, answers = ANSWERS[name]
    assert [sample.img_id for sample in found] == [0, 1, 2]
    for sample in found:
        assert sample.pretext.scores.shape == (puzzles, answers)
        torch.testing.assert_close(sample.pretext.scores.sum(-1), torch.ones(puzzles))
        assert sample.pretext.labels.shape == (puzzles,)
        assert sample.pretext.labels.dtype == torch.int64
    if name != "jigsaw":
        assert found[0].pretext.labels.tolist() == list(range(answers))
    torch.manual_seed(1)
    again = model(images, samples(3), mode="predict")
    for sample, other in zip(found, again, strict=True):
        assert torch.equal(sample.pretext.scores, other.pretext.scores)
        assert torch.equal(sample.pretext.labels, other.pretext.labels)
    check_state_dict(model, lambda model: scores(model, images))


@every_model
def test_memory_order_does_not_matter(name, pictures):
    model, images = build(name), pictures(2, SIDE)
    last = ImageBatch(images.tensor.contiguous(memory_format=torch.channels_last), images.sizes)
    for one, other in zip(scores(model, images), scores(model, last), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_model
def test_two_images_are_learnt_by_heart(name, pictures):
    model, images = build(name), pictures(2, SIDE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(images, samples(2), mode="loss")["loss_pretext"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(images).accuracy() > 0.9


@every_model
def test_padded_images_are_refused_with_what_to_change(name):
    images = ImageBatch(torch.zeros(2, 3, SIDE, SIDE), [(SIDE, SIDE), (SIDE, SIDE - 1)])
    with pytest.raises(ValueError, match="48x47 is padded to 48x48.*pad_divisor=1"):
        build(name).loss(images, samples(2))


@every_model
def test_features_are_those_of_whole_images(name, pictures):
    model, images = build(name).eval(), pictures(2, SIDE)
    with torch.no_grad():
        features = model(images, mode="features")
    assert {key: value.shape for key, value in features.items()} == {"map0": (2, 8, 24, 24), "map1": (2, 16, 12, 12)}


def test_two_ranks_average_the_gradients_of_their_halves(on_two_ranks, pictures):
    models, images = [build(name) for name in CONFIGS], pictures(4, SIDE)
    first, second = on_two_ranks(models, images, samples(4))
    for name, model, gradients, others in zip(CONFIGS, models, first, second, strict=True):
        expected = {key: 0 for key in gradients}
        for rank in range(2):
            alone = copy.deepcopy(model)
            torch.manual_seed(rank)                                                    # each rank draws puzzles of its own
            half = slice(2 * rank, 2 * rank + 2)
            alone.loss(ImageBatch(images.tensor[half], images.sizes[half]), samples(2))["loss_pretext"].backward()
            expected = {key: value + alone.get_parameter(key).grad / 2 for key, value in expected.items()}
        for key, value in gradients.items():
            assert torch.equal(value, others[key]), (name, key)
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


def test_a_view_of_each_rotation_goes_through_the_trunk(pictures):
    model, images = build("rotation"), pictures(2, SIDE)
    seen = []
    model.backbone.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    assert model(images).labels.tolist() == [[0, 1, 2, 3]] * 2
    (views,) = seen
    for index in range(8):
        assert torch.equal(views[index], torch.rot90(images.tensor[index // 4], index % 4, (1, 2)))


def native_rotation():
    torch.manual_seed(0)
    return MODELS.build(dict(type="Rotation", backbone=dict(type="MoonViT", channels=16, num_layers=1, num_heads=2, hidden_channels=24,
                                                            position_grid=(4, 4))))


def test_rotations_of_images_of_their_own_sizes_are_told_apart_whatever_lies_beside_them():
    model = native_rotation().eval()
    generator = torch.Generator().manual_seed(0)
    images = ImageList(tuple(torch.randn(3, *size, generator=generator) for size in ((28, 84), (56, 28))))
    logits, labels = model(images)
    assert logits.shape == (2, 4, 4)
    assert labels.tolist() == [[0, 1, 2, 3]] * 2
    for index, image in enumerate(images.images):
        for turns in range(4):
            mean = model.backbone(image.rot90(turns, (1, 2))[None]).tokens.mean((0, 1))
            torch.testing.assert_close(logits[index, turns], model.head.classify(mean))
    square = torch.randn(2, 3, 56, 56, generator=generator)
    torch.testing.assert_close(model(ImageBatch(square, ((56, 56),) * 2)).logits, model(ImageList(square.unbind())).logits)
    assert all(len(sample.pretext) == 4 for sample in model.predict(images, samples(2)))


def test_of_images_of_their_own_sizes_too_padding_is_refused_and_other_puzzles_want_a_batch():
    padded = ImageList.pad([torch.zeros(3, 28, 30)], divisor=28)
    with pytest.raises(ValueError, match="an image of 28x30 is padded to 28x56; end the pipeline with.*RandomNativeResize"):
        native_rotation()(padded)
    with pytest.raises(ValueError, match="Jigsaw computes on images in one tensor.*ImagePreprocessor"):
        build("jigsaw")(ImageList((torch.zeros(3, 96, 96),)))


@several_cells
def test_the_centre_is_paired_with_each_neighbour_in_raster_order(pictures, pool):
    model, images = build("relative patch", pool=pool), pictures(2, SIDE)
    seen, pairs = [], []
    model.puzzle.register_forward_hook(lambda _, __, puzzle: seen.append(puzzle.patches))
    model.head.register_forward_hook(lambda _, inputs, __: pairs.append(inputs))
    model.backbone.eval()
    model(images)
    centre, neighbour = (part.unflatten(0, (2, 8)) for part in pairs[0])
    embeddings = cells_of(model.backbone(seen[0].flatten(0, 1))[-1], pool).unflatten(0, (2, 9))
    for index, cell in enumerate((0, 1, 2, 3, 5, 6, 7, 8)):
        torch.testing.assert_close(centre[:, index], embeddings[:, 4])
        torch.testing.assert_close(neighbour[:, index], embeddings[:, cell])


@several_cells
def test_permuted_embeddings_are_those_of_permuted_tiles(pictures, pool):
    """The long way of the paper: nine tiles put in an order, then through the trunk, for each of the orders."""
    model, images = build("jigsaw", pool=pool).eval(), pictures(2, SIDE)
    with torch.no_grad():
        logits, labels = model(images)
        puzzle = model.puzzle(images.tensor)
        for image in range(2):
            for turn in range(8):
                order = model.puzzle.permutations[labels[image, turn]]
                shuffled = puzzle.tiles[image, order]
                embeddings = cells_of(model.backbone(shuffled)[-1], pool)[None]
                alone = model.head(embeddings, torch.arange(9).view(1, 1, 9))
                torch.testing.assert_close(alone[0, 0], logits[image, turn], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["relative patch", "jigsaw"])
def test_a_grid_of_no_cells_is_refused(name):
    with pytest.raises(ConfigError, match="pool is how many cells"):
        build(name, pool=0)


@pytest.mark.parametrize("name", ["relative patch", "jigsaw"])
def test_a_grid_finer_than_the_map_is_refused(pictures, name):
    with pytest.raises(ConfigError, match="model.pool: the last map of a piece of .* pixels has 3 x 3 locations, and 4 x 4 cells"):
        build(name, pool=4)(pictures(2, SIDE))


def test_a_checkpoint_brings_its_permutations(pictures):
    config = copy.deepcopy(CONFIGS["jigsaw"])
    model = MODELS.build(config)
    config["puzzle"]["seed"] = 7
    other, images = MODELS.build(config), pictures(2, SIDE)
    assert not torch.equal(other.puzzle.permutations, model.puzzle.permutations)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other.puzzle.permutations, model.puzzle.permutations)
    for one, another in zip(scores(model, images), scores(other, images), strict=True):
        assert torch.equal(one, another)


def test_nothing_in_a_pretext_model_is_called_num_classes():
    """Pre-flight would compare it with the classes of the data set."""
    for name in CONFIGS:
        assert not [part for part in build(name).modules() if hasattr(part, "num_classes")]


class UpOrDown(torch.nn.Module):
    """A plugin's puzzle of two answers in the place of the rotations."""
    num_answers = 2

    def forward(self, images):
        views = torch.stack([images, images.flip(2)], 1)
        return Turned(views, torch.arange(2).expand(len(images), 2))


class Turned(NamedTuple):
    views: torch.Tensor
    labels: torch.Tensor


def test_a_puzzle_of_another_number_of_answers_has_a_head_for_them(pictures):
    model = build("rotation", puzzle=UpOrDown())
    assert scores(model, pictures(3, SIDE))[0].shape == (2, 2)
    assert model.loss(pictures(3, SIDE), samples(3))["loss_pretext"].item() == pytest.approx(math.log(2), rel=0.1)


@pytest.mark.parametrize("name, other, wanted", [("rotation", "jigsaw", "views and labels"), ("relative patch", "jigsaw", "patches"),
                                                 ("relative patch", "rotation", "patches")])
def test_a_puzzle_for_another_model_is_one_message(name, other, wanted, pictures):
    puzzle = CONFIGS[other].get("puzzle", {"type": "FourRotations"})
    with pytest.raises(ConfigError, match=rf"^model\.puzzle: this model wants {wanted} of its puzzle, and {puzzle['type']} makes .*, "):
        build(name, puzzle=puzzle).loss(pictures(2, SIDE), samples(2))
    with pytest.raises(ConfigError, match=r"puzzle: Jigsaw wants a puzzle with permutations.*and FourRotations has none"):
        build("jigsaw", puzzle={"type": "FourRotations"})
