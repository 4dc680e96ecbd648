from visionkit.engine import checkpointing_benchmark
from visionkit.engine.checkpointing_benchmark import Cost


def test_it_prints_a_row_for_each_policy_after_none(tool, monkeypatch, capsys):
    asked = []

    def measure(cfg, iterations, policies):
        asked.append((cfg.model.backbone.depth, iterations, policies))
        return (Cost(policy, 100, 200, 0.1, 1.0, 2.0) for policy in policies)

    monkeypatch.setattr(checkpointing_benchmark, "measure_checkpointing", measure)
    config = checkpointing_benchmark.__file__.replace("visionkit/engine/checkpointing_benchmark.py", "configs/quickstart.py")
    assert tool("benchmark_checkpointing", config, "--iterations", 2, "--policies", "sqrt", "--cfg-options", "model.backbone.depth=34") == 0
    assert asked == [(34, 2, ["none", "sqrt"])]
    printed = capsys.readouterr().out
    assert "set in model.backbone" in printed
    assert [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")] == ["none", "sqrt"]


def test_wrong_arguments_are_told_before_anything_is_measured(tool, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("model = dict(type='ImageClassifier', backbone=dict(type='ConvBlocks'), num_classes=2)")
    for arguments, message in ((("--policies", "sqr"), "Did you mean 'sqrt'"), (("--iterations", 0), "--iterations is 1 or more, got 0"),
                               ((), "has no train_dataloader")):
        assert tool("benchmark_checkpointing", config, *arguments) == 2
        assert message in capsys.readouterr().err


def test_a_model_without_the_switch_is_one_message(tool, tmp_path, capsys):
    (tmp_path / "config.py").write_text("model = dict(type='NoSuchModel')")
    assert tool("benchmark_checkpointing", tmp_path / "config.py") == 2
    assert "error: model: no part of this model has an argument `checkpointing`" in capsys.readouterr().err
