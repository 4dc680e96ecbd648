import pytest
import torch
from mmengine.optim import LinearLR

from visionkit.engine.noam import NoamLR
from visionkit.registry import PARAM_SCHEDULERS, ConfigError


def optimizer(lr=1.0):
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr, betas=(0.9, 0.98), eps=1e-9)


def test_the_rate_is_the_formulas_at_steps_1_4000_and_100000():
    """Spec 07, item 4: 1.747e-7, 6.988e-4 and 1.398e-4, after 100,000 multiplications off by less than 1e-9 of the value."""
    chosen = optimizer()
    scheduler = NoamLR(chosen, channels=512, warmup=4000)
    rates = [chosen.param_groups[0]["lr"]]
    for _ in range(99999):
        scheduler.step()
        rates.append(chosen.param_groups[0]["lr"])
    for step in (1, 4000, 100000):
        assert rates[step - 1] == pytest.approx(512**-0.5 * min(step**-0.5, step * 4000**-1.5), rel=1e-9)
    assert max(rates) == rates[3999]


def test_it_multiplies_the_optimizers_rate_and_goes_on_from_a_state():
    first, second = optimizer(2.0), optimizer(2.0)
    one = NoamLR(first, channels=16, warmup=3)
    for _ in range(4):
        one.step()
    other = NoamLR(second, channels=16, warmup=3)
    other.load_state_dict(one.state_dict())
    second.param_groups[0]["lr"] = first.param_groups[0]["lr"]
    for scheduler, chosen in ((one, first), (other, second)):
        scheduler.step()
        assert chosen.param_groups[0]["lr"] == pytest.approx(2 * 16**-0.5 * 6**-0.5)


def test_a_config_can_name_it_and_wrong_settings_are_refused():
    assert isinstance(PARAM_SCHEDULERS.build({"type": "NoamLR", "warmup": 10}, default_args={"optimizer": optimizer()}), NoamLR)
    assert PARAM_SCHEDULERS.get("LinearLR") is LinearLR
    with pytest.raises(ConfigError, match="channels and warmup must be positive, got 512 and 0"):
        PARAM_SCHEDULERS.build({"type": "NoamLR", "warmup": 0}, default_args={"optimizer": optimizer()})
    with pytest.raises(ConfigError, match="goes by iterations"):
        PARAM_SCHEDULERS.build({"type": "NoamLR", "by_epoch": True}, default_args={"optimizer": optimizer()})
