"""Testing with several views of each image, flipped and in other sizes, whose predictions are merged; and in bfloat16."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner, TestLoop
from torch import Tensor
from torch.utils.data import DataLoader

from visionkit.ops import NMS
from visionkit.ops.detections import Thinning
from visionkit.registry import LOOPS, OPS, TRANSFORMS, ConfigError, check_arguments
from visionkit.structures import InstanceData, Sample
from visionkit.transforms import PackSample, Resize

FLIPS = ("horizontal", "vertical", "diagonal")


class TestTimeAugmentation:
    """What views there are of an image, and how their predictions become one.

    Every model predicts in pixels of the original image, so merging is: mirror the boxes of flipped views back, put all boxes together,
    and thin them out. That is also needed where the model itself has no suppression, as DETR: each view finds the same object.

    Args:
        scales: sizes of the views, as factors of the size that the test pipeline makes.
        flips: a view of each size is flipped in each of these directions, besides one that is not; `horizontal`, `vertical`, `diagonal`.
        nms: how the views' predictions are thinned out, `nms`, `soft_nms` or `box_voting`; by default `dict(type="nms", iou=0.5)`.
        max_per_image: predictions kept, best first.

    Raises:
        ConfigError: an argument that is none of the above.
    """

    __test__ = False                                         # its name begins like that of a test case

    def __init__(self, scales: Sequence[float] = (1.0,), flips: Sequence[str] = ("horizontal",), nms: dict | Thinning | None = None,
                 max_per_image: int = 100) -> None:
        if not scales or min(scales) <= 0:
            raise ConfigError(f"a view's size is a factor above 0, and there is at least one; got {scales}", ("scales",))
        if isinstance(flips, str) or not {*flips} <= {*FLIPS}:
            raise ConfigError(f"flips is a list of {', '.join(FLIPS)}; got {flips!r}", ("flips",))
        if max_per_image < 1:
            raise ConfigError(f"at least one prediction is kept, got {max_per_image}", ("max_per_image",))
        self.scales = tuple(scales)
        self.flips = tuple(flips)
        self.nms = OPS.make(nms or NMS(0.5), at="nms")
        self.max_per_image = max_per_image

    def pipeline(self, transforms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A test pipeline that ends in PackSample, made to give all views, an unflipped one first.

        Raises:
            ConfigError: the pipeline does not end so, resizes more than once, or flips by itself.
        """
        kinds = [_component(transform["type"]) for transform in transforms]
        if not kinds or not issubclass(kinds[-1], PackSample):
            raise ConfigError("views are made before the PackSample at the end of the test pipeline, and there is none")
        resizes = [index for index, kind in enumerate(kinds) if issubclass(kind, Resize)]
        if len(resizes) > 1 or any(kind.__name__ == "RandomFlip" for kind in kinds):
            raise ConfigError("views are made by one Resize and no RandomFlip in the test pipeline; this one has "
                              f"{', '.join(kind.__name__ for kind in kinds)}")
        first = resizes[0] if resizes else len(kinds) - 1
        resize = dict(transforms[first]) if resizes else {"type": "Resize", "scale_factor": 1.0}
        sizes = [_scaled(resize, scale) for scale in self.scales]
        flips = [{"type": "RandomFlip", "prob": 0.0}, *({"type": "RandomFlip", "prob": 1.0, "direction": flip} for flip in self.flips)]
        rest = [[dict(transform)] for transform in transforms[first + len(resizes[:1]):]]
        return [*map(dict, transforms[:first]), {"type": "TestTimeAug", "transforms": [sizes, flips, *rest]}]

    def predict(self, step: Callable[[dict[str, Any]], Sequence[Sample]], batch: Mapping[str, Sequence[Any]]) -> list[Sample]:
        """One sample an image.

        Args:
            step: a model's `test_step`.
            batch: `inputs` and `data_samples`, a list of views, each with one entry an image.
        """
        views = [step({key: list(batch[key][view]) for key in ("inputs", "data_samples")}) for view in range(len(batch["inputs"]))]
        return [self.merge(samples) for samples in zip(*views, strict=True)]

    def merge(self, views: Sequence[Sample]) -> Sample:
        """The first view's sample with the predictions of all of them.

        Raises:
            ConfigError: a model predicts more than boxes.
        """
        more = {*views[0].pred_instances.keys()} - {"bboxes", "scores", "labels"} | {*views[0].keys()} & {"pred_panoptic"}
        if more:
            raise ConfigError(f"only boxes of several views can be merged, and this model also predicts {', '.join(sorted(more))}; test it "
                              f"without tta")
        boxes, scores, labels = self.nms(
            torch.cat([mirrored_back(view.pred_instances.bboxes, view) for view in views]),
            torch.cat([view.pred_instances.scores for view in views]), torch.cat([view.pred_instances.labels for view in views]))
        kept = slice(self.max_per_image)
        merged = views[0]
        merged.pred_instances = InstanceData(bboxes=boxes[kept], scores=scores[kept], labels=labels[kept])
        return merged


def views_of(cfg: Config) -> TestTimeAugmentation:
    """What the section `tta` of a config asks for; by default one flip.

    Raises:
        ConfigError: with the place in the config.
    """
    section = cfg.get("tta") or {}
    try:
        check_arguments(TestTimeAugmentation, section)
        return TestTimeAugmentation(**section)
    except ConfigError as error:
        raise error.under("tta") from error.__cause__


def use_inference_loop(cfg: Config, tta: bool, amp: bool) -> None:
    """Let the test of `cfg` make views of every image, compute in bfloat16, or both.

    Raises:
        ConfigError: the config asks for a test loop of another kind, or its pipeline cannot make views.
    """
    if (cfg.get("test_cfg") or {}).get("type", "TestLoop") != "TestLoop":
        raise ConfigError(f"tta and amp need TestLoop here, and this is {cfg.test_cfg.type!r}", ("test_cfg", "type"))
    cfg.test_cfg = {"type": "InferenceLoop", "amp": amp}
    if tta:
        views = views_of(cfg)
        cfg.test_cfg["tta"] = dict(cfg.get("tta") or {})
        _make_views(cfg.test_dataloader["dataset"], views, ("test_dataloader", "dataset"))


def _make_views(dataset: Any, views: TestTimeAugmentation, path: tuple[str | int, ...]) -> None:
    """In the pipeline of a data set, or of those that it wraps."""
    if dataset.get("pipeline"):
        try:
            dataset["pipeline"] = views.pipeline(dataset["pipeline"])
        except ConfigError as error:
            raise error.under(*path, "pipeline") from error.__cause__
    if "dataset" in dataset:
        _make_views(dataset["dataset"], views, (*path, "dataset"))
    for index, part in enumerate(dataset.get("datasets", ())):
        _make_views(part, views, (*path, "datasets", index))


def mirrored_back(boxes: Tensor, sample: Sample) -> Tensor:
    """Boxes [N, 4] of a view, in original pixels but as the view shows them, where they are in the image as it is."""
    height, width = sample.ori_shape
    x1, y1, x2, y2 = boxes.unbind(1)
    direction = sample.flip_direction if sample.flip else None
    if direction in ("horizontal", "diagonal"):
        x1, x2 = width - x2, width - x1
    if direction in ("vertical", "diagonal"):
        y1, y2 = height - y2, height - y1
    return torch.stack([x1, y1, x2, y2], 1)


def _component(name: str | type) -> type:
    return TRANSFORMS.get(name) if isinstance(name, str) else name


def _scaled(resize: dict[str, Any], factor: float) -> dict[str, Any]:
    """The config of a Resize whose result is `factor` times as large."""
    key = "scale" if resize.get("scale") is not None else "scale_factor"
    size = resize[key]
    number = (lambda side: max(1, round(side * factor))) if key == "scale" else (lambda side: side * factor)
    return {**resize, key: tuple(map(number, size)) if isinstance(size, Sequence) else number(size)}


@LOOPS.register_module()
class InferenceLoop(TestLoop):
    """mmengine's TestLoop, with two more ways to predict.

    Args:
        runner: the runner; it gives itself, the data loader and the evaluator.
        dataloader: of the test images; with `tta` its pipeline gives views.
        evaluator: of the predictions.
        tta: the arguments of `TestTimeAugmentation`.
        amp: compute in bfloat16.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, evaluator: Any, tta: Mapping[str, Any] | None = None,
                 amp: bool = False) -> None:
        super().__init__(runner, dataloader, evaluator)
        self.views = None if tta is None else TestTimeAugmentation(**tta)
        self.amp = amp

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Mapping[str, Sequence[Any]]) -> None:
        self.runner.call_hook("before_test_iter", batch_idx=idx, data_batch=data_batch)
        step = self.runner.model.test_step
        with autocast(self.runner.model, self.amp):
            samples = step(data_batch) if self.views is None else self.views.predict(step, data_batch)
        if self.views is not None:                           # the hooks see each image once
            data_batch = {key: list(values[0]) for key, values in data_batch.items()}
        self.evaluator.process(data_samples=samples, data_batch=data_batch)
        self.runner.call_hook("after_test_iter", batch_idx=idx, data_batch=data_batch, outputs=samples)


def autocast(model: torch.nn.Module, enabled: bool) -> torch.autocast:
    """Compute in bfloat16 on the device where `model` is."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=enabled)
