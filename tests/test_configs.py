import functools
import random
from pathlib import Path

import pytest
import torch

from visionkit.engine import load_config
from visionkit.registry import MODELS

ROOT = Path(__file__).parents[1]
read = functools.cache(load_config)
CARDS = [path for path in sorted((ROOT / "configs").glob("**/*.py")) if path.parent.name != "_base_"]


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_every_recipe_card_builds_its_model(card):
    with torch.device("meta"):                                              # no weights are drawn, which takes seconds
        model = MODELS.make(read(card).model, at="model")
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_every_recipe_card_opens_with_its_command(card):
    text = card.read_text()
    assert text.startswith('"""')
    assert f"tools/train.py {card.relative_to(ROOT)}" in text.split('"""')[1]


def test_the_cards_with_and_without_a_pretrained_trunk_differ_in_nothing_else():
    without, pretrained = (load_config(ROOT / f"configs/faster_rcnn/faster_rcnn_r18_fpn_bccd_10percent{end}.py").to_dict()
                           for end in ("", "_pretrained"))
    assert {key for key in without if without[key] != pretrained[key]} == {"load_from", "load_from_part"}
    assert pretrained["load_from_part"] == "backbone"
    assert without["train_dataloader"]["dataset"]["indices"] == sorted(random.Random(0).sample(range(205), 20))


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_every_recipe_card_counts_its_checkpoints_as_it_trains(card):
    cfg = read(card)
    by_iterations = cfg.train_cfg.type == "IterLoop"
    assert cfg.default_hooks.checkpoint.get("by_epoch", True) != by_iterations
    assert cfg.log_processor.by_epoch != by_iterations
