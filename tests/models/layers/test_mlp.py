import pytest
import torch

from visionkit.models.layers.mlp import MLP


def test_an_mlp_is_linear_layers_with_a_relu_between():
    mlp = MLP(3, 8, 2, 3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(8, 3), (8, 8), (2, 8)]
    x = torch.randn(4, 5, 3)
    hidden = x
    for layer in mlp.layers[:2]:
        hidden = (hidden @ layer.weight.t() + layer.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.layers[2].weight.t() + mlp.layers[2].bias)


def test_one_layer_has_no_relu_and_none_is_refused():
    mlp = MLP(3, 8, 2, 1)
    assert mlp(torch.randn(50, 3)).min() < 0
    with pytest.raises(ValueError, match="num_layers=0"):
        MLP(3, 8, 2, 0)
