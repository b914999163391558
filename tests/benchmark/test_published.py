# SPDX-License-Identifier: Apache-2.0
"""Results of Anomalib's benchmark pipeline beside published figures, and configurations of that pipeline."""

from pathlib import Path

import pytest
import yaml

from anomalib_ext.benchmark import compare

PUBLISHED = Path(__file__).parents[2] / "configs" / "benchmark" / "published.csv"


def test_results_of_the_pipeline_beside_published_ones(tmp_path: Path) -> None:
    """Means over what was measured, and the figures of that data set alone."""
    (tmp_path / "results.csv").write_text(
        "model.class_path,data.class_path,data.init_args.category,image_AUROC,pixel_AUROC\n"
        "RdAkf,anomalib.data.MVTecAD,bottle,0.99,0.98\n"
        "RdAkf,anomalib.data.MVTecAD,pill,0.97,0.96\n"
        "Patchcore,anomalib.data.MVTecAD,bottle,1.0,0.95\n"
    )
    text = compare(tmp_path, PUBLISHED)
    assert "| MVTecAD | RdAkf | measured, products: 2 | 98.0 | 97.0 |  |  |" in text
    assert "| MVTecAD | Patchcore | measured, products: 1 | 100.0 | 95.0 |  |  |" in text
    assert "| MVTecAD | RdAkf | one class, wide_resnet50_2 | 99.0 | 97.9 | 94.8 | RD-AKF, table of results |" in text
    assert "Visa" not in text
    with pytest.raises(FileNotFoundError, match=r"There is no results\.csv in .* Run `anomalib benchmark` first"):
        compare(PUBLISHED.parent, PUBLISHED)


def test_of_several_runs_of_the_pipeline_the_last_counts(tmp_path: Path) -> None:
    """Not their mean, and the product is counted once."""
    for day, value in (("2026-01-01", 0.5), ("2026-01-02", 0.9)):
        (tmp_path / day).mkdir()
        (tmp_path / day / "results.csv").write_text(
            "model.class_path,data.class_path,data.init_args.category,image_AUROC\n"
            f"RdAkf,anomalib.data.MVTecAD,bottle,{value}\n"
        )
    assert "| MVTecAD | RdAkf | measured, products: 1 | 90.0 |" in compare(tmp_path, PUBLISHED)


def test_settings_are_not_averaged(tmp_path: Path) -> None:
    """Each has a row that says what is different, also where a file does not know an argument of another."""
    start = "seed,model.class_path,data.class_path,data.init_args.category,data.init_args.train_batch_size"
    for name, text in {
        "a": f"{start},image_AUROC\n0,RdAkf,MVTecAD,bottle,4,0.5\n0,RdAkf,MVTecAD,pill,4,0.7\n"
        "0,RdAkf,MVTecAD,pill,8,0.8\n",
        "b": f"{start},model.init_args.backbone,image_AUROC\n0,RdAkf,anomalib.data.MVTecAD,pill,4,resnet18,0.9\n",
        "c": f"{start},model.init_args.layers,image_AUROC\n1,SaCfaPatchCore,MVTecAD,pill,4,\"['layer2']\",1\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.csv").write_text(text)
    text = compare(tmp_path, PUBLISHED)
    assert "| MVTecAD | RdAkf | measured, products: 2, seed: 0, train_batch_size: 4 | 60.0 |" in text
    assert "| MVTecAD | RdAkf | measured, products: 1, seed: 0, train_batch_size: 8 | 80.0 |" in text
    assert "| RdAkf | measured, products: 1, seed: 0, train_batch_size: 4, backbone: resnet18 | 90.0 |" in text
    assert "products: 1, seed: 1, train_batch_size: 4, layers: ['layer2'] | 100.0 |" in text
    assert "| private, heat sinks | SaCfaPatchCore | one class, wide_resnet50_2 | 98.7 |" in text


@pytest.mark.parametrize("name", ["mvtec_ad", "visa", "folder"])
def test_configs_of_the_pipeline(name: str) -> None:
    """Anomalib's pipeline finds every model and the data by the names in the file."""
    import anomalib.models
    from anomalib import data

    config = yaml.safe_load((PUBLISHED.parent / f"{name}.yaml").read_text())["benchmark"]
    models = config["model"]["class_path"]["grid"]
    assert {"ContinualPatchCore", "SaCfaPatchCore", "RdAkf", "HetNet", "Crr"} < set(models)
    assert set(models) <= set(anomalib.models.__all__)
    assert config["data"]["class_path"] in data.__all__
