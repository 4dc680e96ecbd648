from pathlib import Path

import pytest

from visionkit.engine import load_config
from visionkit.registry import MODELS

ROOT = Path(__file__).parents[1]
CARDS = [path for path in sorted((ROOT / "configs").glob("**/*.py")) if path.parent.name != "_base_"]


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_every_recipe_card_builds_its_model(card):
    model = MODELS.make(load_config(card).model, at="model")
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)
def test_every_recipe_card_opens_with_its_command(card):
    text = card.read_text()
    assert text.startswith('"""')
    assert f"tools/train.py {card.relative_to(ROOT)}" in text.split('"""')[1]
