import math

import pytest
import torch
from torch import nn

from visionkit.models.self_supervised.cpc import Codes
from visionkit.registry import MODELS, ConfigError
from visionkit.structures import ImageBatch, Sample
from visionkit.testing.module import check_gradients, check_modes, check_state_dict

both_contexts = pytest.mark.parametrize("context", ["masked_convs", "gru"])


def build(**changes) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build({"type": "CPC", "backbone": {"type": "StridedConvs", "channels": (8, 12)}, "context_channels": 10,
                         "context_layers": 2, "rows_ahead": (1, 2),
                         "puzzle": {"type": "OverlappingCrops", "size": 8, "stride": 4, "subcrop": 7}} | changes)


def images(count=3, size=(24, 20)) -> ImageBatch:
    return ImageBatch(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)), [size] * count)


def samples(count=3) -> list[Sample]:
    return [Sample(metainfo={"img_id": index}) for index in range(count)]


@both_contexts
def test_every_step_is_finite_and_every_parameter_learns(context):
    model = build(context=context)
    check_modes(model)

    def loss(module):
        torch.manual_seed(0)
        losses = module(images(), samples(), mode="loss")
        assert set(losses) == {"loss_1_ahead", "loss_2_ahead"}
        assert all(term.isfinite() and term.dim() == 0 for term in losses.values())
        return sum(losses.values())

    check_gradients(model, loss)
    with torch.autocast("cpu", torch.bfloat16):
        check_gradients(model, loss)


@both_contexts
def test_predictions_are_the_same_each_time_and_after_saving_and_loading(context):
    model = build(context=context).eval()

    @torch.no_grad()
    def run(module):
        return [field for sample in module(images(), samples(), mode="predict") for field in (sample.pretext.scores, sample.pretext.labels)]

    assert all(torch.equal(*pair) for pair in zip(run(model), run(model), strict=True))
    check_state_dict(model, run)


@both_contexts
def test_a_context_sees_its_row_and_those_above_and_none_below(context):
    model = build(context=context)
    z = torch.randn(1, 12, 5, 4, requires_grad=True)
    for row in range(5):
        gradient, = torch.autograd.grad(model.read_rows(z)[:, :, row].square().sum(), z)
        seen = gradient.any(1)[0]                                                       # [R, C]
        assert not seen[row + 1:].any()
        assert seen[row].all()
        assert seen[max(row - 2, 0)].all()                                              # two layers of convolutions reach two rows up


def test_a_column_of_the_recurrent_context_sees_no_other_and_convolutions_see_their_neighbours():
    z = torch.randn(1, 12, 5, 4, requires_grad=True)
    seen = {context: torch.autograd.grad(build(context=context).read_rows(z)[:, :, 2, 1].square().sum(), z)[0].any(1)[0]
            for context in ("gru", "masked_convs")}
    assert seen["gru"].nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]
    assert seen["masked_convs"][:3].all()
    assert not seen["masked_convs"][3:].any()


def test_predictors_of_zeros_pay_the_logarithm_of_their_candidates():
    """Spec 1, item 2: 3 images of 5 x 4 crops leave 3 * 4 * 4 places one row ahead, 3 * 3 * 4 two ahead."""
    model = build()
    for predictor in model.predictors:
        nn.init.zeros_(predictor.weight)
    losses = model.loss(images(), samples())
    assert losses["loss_1_ahead"].item() == pytest.approx(math.log(48) / 2, abs=1e-6)
    assert losses["loss_2_ahead"].item() == pytest.approx(math.log(36) / 2, abs=1e-6)


def test_the_loss_compares_each_prediction_with_the_codes_of_all_places_of_all_images():
    model = build().eval()
    z, context = model(images())
    for ahead, predictor in zip((1, 2), model.predictors, strict=True):
        codes = [z[b, :, r, c] for b in range(3) for r in range(ahead, 5) for c in range(4)]
        terms = []
        for b in range(3):
            for r in range(5 - ahead):
                for c in range(4):
                    predicted = predictor.weight[:, :, 0, 0] @ context[b, :, r, c]
                    right = (predicted * z[b, :, r + ahead, c]).sum()
                    terms.append(torch.stack([(predicted * code).sum() for code in codes]).logsumexp(0) - right)
        expected = torch.stack(terms).mean() / 2
        torch.testing.assert_close(model.loss(images(), samples())[f"loss_{ahead}_ahead"], expected, rtol=0, atol=1e-5)


def test_a_row_of_the_pretext_is_a_prediction_with_its_place_in_every_image():
    model = build().eval()
    z, context = model(images())
    for b, sample in enumerate(model.predict(images(), samples())):
        assert sample.pretext.labels.tolist() == [b] * (16 + 12)
        predicted = model.predictors[1].weight[:, :, 0, 0] @ context[b, :, 2, 3]        # the last but four of the second step's rows
        torch.testing.assert_close(sample.pretext.scores[16 + 11], z[:, :, 4, 3] @ predicted)


def test_crops_are_encoded_each_by_itself_and_keep_their_place():
    model = build().eval()
    z = model(images()).z
    crops = model.puzzle(images().tensor)
    for b, r, c in ((0, 0, 0), (1, 3, 2), (2, 4, 3)):
        torch.testing.assert_close(z[b, :, r, c], model.backbone(crops[b, r, c][None])[-1].mean((2, 3))[0])
    features = model(images(), mode="features")
    assert torch.equal(features["grid"], z)
    torch.testing.assert_close(features["z"], z.mean((2, 3)))
    assert features["map1"].shape == (3, 12, 6, 5)


def test_it_learns_by_heart_how_images_go_on():
    """Four images of two colours each, the lower half differing where the upper does: right for 25 % by chance."""
    model = build(puzzle={"type": "OverlappingCrops", "size": 8, "stride": 4})
    halves = torch.randn(4, 3, 2, 1, generator=torch.Generator().manual_seed(2)).repeat_interleave(12, 2).expand(-1, -1, -1, 20)
    batch = ImageBatch((halves + 0.1 * images(4).tensor).contiguous(), [(24, 20)] * 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    @torch.no_grad()
    def accuracy():
        found = [sample.pretext for sample in model.predict(batch, samples(4))]
        return sum((one.scores.argmax(1) == one.labels).float().mean().item() for one in found) / 4

    first = sum(model.loss(batch, samples(4)).values()).item()
    before = accuracy()
    for _ in range(25):
        optimizer.zero_grad()
        loss = sum(model.loss(batch, samples(4)).values())
        loss.backward()
        optimizer.step()
    assert before < 0.6
    assert accuracy() > 0.9
    assert loss.item() < 0.7 * first


def test_a_prediction_that_is_the_code_has_no_loss():
    model = build()
    code = torch.eye(48).view(3, 4, 4, 48).permute(0, 3, 1, 2) * 10                     # every place another direction
    model.predictions = lambda codes: iter([(1, code, code)])
    model.forward = lambda images: Codes(code, code)
    assert model.loss(images(), samples())["loss_1_ahead"].item() < 1e-6


@pytest.mark.parametrize("changes, said", [({"context": "lstm"}, "'masked_convs' or 'gru', got 'lstm'"), ({"rows_ahead": ()}, "rows_ahead"),
                                           ({"rows_ahead": (0, 1)}, "at least 1"), ({"rows_ahead": (2, 2)}, "different numbers")])
def test_a_model_that_could_not_learn_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        build(**changes)


@pytest.mark.parametrize("batch, said", [
    (images(2, (12, 20)), "more rows than the 2"), (ImageBatch(torch.zeros(2, 3, 24, 20), [(24, 20), (20, 20)]), "pad_divisor")],
    ids=["flat", "padded"])
def test_images_that_leave_nothing_to_predict_are_refused(batch, said):
    with pytest.raises(ConfigError, match=said):
        build().loss(batch, samples(2))


@pytest.mark.parametrize("puzzle", [{"type": "FourRotations"}, {"type": "JigsawTiles", "tile": 6}])
def test_a_puzzle_for_another_model_is_refused(puzzle):
    with pytest.raises(ConfigError, match="model.puzzle: this model wants crops .* it is a puzzle for another model"):
        build(puzzle=puzzle)(images(2, (24, 24)))
