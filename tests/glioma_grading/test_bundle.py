# Copyright (c) ClinicalFMamba contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

import json
import os
import re
import shutil
import sys

import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from grading import BUNDLE, COMMON, CONFIGS, FUSION, NETWORK, ROOT, TRAIN, TRAIN_3D, names, run, run_command, workflow
from monai.bundle import ConfigParser, ConfigWorkflow
from sklearn.metrics import roc_auc_score

from scripts.label_model import label_model
from scripts.predictions import read_predictions

LEARN = {"source": "t2_flair", "num_folds": 2}


@pytest.fixture(scope="module")
def learned(patients, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    run(
        "train",
        run_id="training",
        dataset_dir=str(patients),
        output_dir=str(folder),
        **TRAIN | LEARN | {"max_epochs": 16},
    )
    return folder


@pytest.fixture(scope="module")
def learned_3d(patients, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned_3d")
    settings = TRAIN_3D | LEARN | {"max_epochs": 16}
    run("train", "volume", run_id="training", dataset_dir=str(patients), output_dir=str(folder), **settings)
    return folder


def evaluate(patients, trained, out, *configs, **overrides):
    settings = {**COMMON, "source": "t2_flair", "progress": False, **overrides}
    settings |= {"folds_file": str(trained / "folds.json"), "checkpoint": str(trained / "model.pt")}
    run("train", "evaluate", *configs, dataset_dir=str(patients), output_dir=str(out), **settings)
    records = read_predictions(out / "predictions.csv")
    return roc_auc_score([r["label"] for r in records], [r["probability"] for r in records])


class TestLearning:
    """Where the grade can be seen, a network must see it, and nothing where it can not."""

    def test_slices(self, patients, learned, tmp_path):
        assert evaluate(patients, learned, tmp_path) > 0.95
        held_out = json.loads((learned / "folds.json").read_text())["folds"][0]["test"]
        assert [r["case"] for r in read_predictions(tmp_path / "predictions.csv")] == sorted(held_out)
        point = json.loads((learned / "operating_point.json").read_text())
        assert {r["threshold"] for r in read_predictions(tmp_path / "predictions.csv")} == {point["threshold"]}
        report = json.loads((tmp_path / "metrics.json").read_text())
        assert report["patients"] == {"LGG": 10, "HGG": 20} and report["slices"] == ["brain"]
        low, high = report["metrics"]["auc"]["interval"]
        assert low <= report["metrics"]["auc"]["value"] <= high
        assert (tmp_path / "curves.png").stat().st_size > 10000

    def test_volumes(self, patients, learned_3d, tmp_path):
        assert evaluate(patients, learned_3d, tmp_path, "volume") > 0.95

    def test_nothing_to_learn(self, patients, tmp_path):
        """With shuffled labels, what is found in training does not hold for the patients that are held out."""
        settings = TRAIN | LEARN | {"max_epochs": 8, "shuffle_labels": True, "describe_training": False}
        settings |= {"cache_dir": str(tmp_path / "cache"), "dataset_dir": str(patients)}
        records = []
        for fold in (0, 1):
            folder = tmp_path / str(fold)
            run("train", output_dir=str(folder), fold=fold, folds_file=str(tmp_path / "folds.json"), **settings)
            shared = {"folds_file": str(tmp_path / "folds.json"), "checkpoint": str(folder / "model.pt"), "fold": fold}
            shared |= {**COMMON, **LEARN, "cache_dir": str(tmp_path / "cache"), "shuffle_labels": True, "report": False}
            run("train", "evaluate", dataset_dir=str(patients), output_dir=str(folder), progress=False, **shared)
            records += read_predictions(folder / "predictions.csv")
        assert len(records) == 60
        assert 0.25 < roc_auc_score([r["label"] for r in records], [r["probability"] for r in records]) < 0.75

    def test_mask_is_marked(self, patients, learned, tmp_path):
        evaluate(patients, learned, tmp_path, mask_suffix="seg", report=False)
        assert {r["slices"] for r in read_predictions(tmp_path / "predictions.csv")} == {"mask"}

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self, patients, tmp_path):
        settings = TRAIN | LEARN | {"max_epochs": 1, "device": "cuda:0"}
        run("train", dataset_dir=str(patients), output_dir=str(tmp_path), **settings)
        assert 0 <= evaluate(patients, tmp_path, tmp_path / "evaluated", device="cuda:0") <= 1

    def test_what_a_run_writes(self, learned):
        files = [name for name in names(learned) if not name.startswith(("cache", "events"))]
        assert files == ["checkpoint_last.pt", "folds.json", "model.pt", "operating_point.json"]
        point = json.loads((learned / "operating_point.json").read_text())
        assert 0 < point["threshold"] < 1 and point["source"] == "t2_flair" and point["validation"]["cases"] == 6
        assert point["ranges"]["height"] == [6, 6] and point["ranges"]["width"][0] > 30

    def test_a_run_goes_on_where_it_stopped(self, patients, tmp_path):
        settings = TRAIN | LEARN | {"cache_dir": str(tmp_path / "cache"), "describe_training": False}
        settings |= {"dataset_dir": str(patients), "learning_rate": 1e-4}
        schedule = {"lr_scheduler#T_max": 2}
        run("train", output_dir=str(tmp_path / "whole"), **settings | {"max_epochs": 2})
        run("train", output_dir=str(tmp_path / "parts"), **settings | schedule)
        last = str(tmp_path / "parts" / "checkpoint_last.pt")
        run("train", output_dir=str(tmp_path / "parts"), resume=last, **settings | {"max_epochs": 2})
        whole, parts = (torch.load(tmp_path / n / "checkpoint_last.pt", weights_only=True) for n in ("whole", "parts"))
        assert parts["trainer"] == whole["trainer"]
        assert all(torch.equal(parts["model"][name], value) for name, value in whole["model"].items())


def grade(out, trained, *configs, **overrides):
    settings = {**COMMON, "source": "t2_flair", "checkpoint": str(trained / "model.pt"), "saliency": False, **overrides}
    run("inference", *configs, kind="infer", output_dir=str(out), **settings)
    return json.loads((out / "grades.json").read_text())


class TestInference:
    def files(self, patients, case="glioma_001", grade="HGG"):
        return {
            f"input_{k}": str(patients / grade / case / f"{case}_{m}.nii.gz") for k, m in (("a", "t2"), ("b", "flair"))
        }

    def test_two_files(self, patients, learned, tmp_path):
        (record,) = grade(tmp_path, learned, saliency=True, **self.files(patients))
        assert list(record)[:5] == ["case", "grade", "probability", "threshold", "weights"]
        assert record["case"] == "glioma_001" and record["grade"] == "HGG"
        assert record["notice"] == "Not for clinical use." and record["weights"].startswith("model.pt ")
        assert names(tmp_path) == ["glioma_001/glioma_001_saliency.png", "grades.csv", "grades.json"]
        lines = (tmp_path / "grades.csv").read_text().splitlines()
        assert lines[0].startswith("case,grade,probability,threshold,weights,") and lines[1].startswith(
            "glioma_001,HGG,"
        )

    def test_a_folder(self, few_patients, learned_3d, tmp_path):
        shutil.copytree(few_patients / "LGG", tmp_path / "data" / "LGG")
        records = grade(tmp_path / "out", learned_3d, "volume", dataset_dir=str(tmp_path / "data"), saliency=True)
        assert len(records) == 6 and len(names(tmp_path / "out")) == 6 + 2
        assert sum(record["grade"] == "LGG" for record in records) >= 5

    def test_as_one_command(self, patients, learned, tmp_path):
        files = self.files(patients)
        settings = {**COMMON, "source": "t2_flair", "checkpoint": learned / "model.pt", "output_dir": "out"}
        result = run_command("inference", cwd=tmp_path, **settings, **files)
        assert result.returncode == 0, result.stderr[-3000:]
        assert json.loads((tmp_path / "out" / "grades.json").read_text())[0]["grade"] == "HGG"

    def test_unsure_cases_are_flagged(self, patients, learned, tmp_path):
        case = "glioma_001"
        source = patients / "HGG" / case
        arrays = {m: nib.load(source / f"{case}_{m}.nii.gz").get_fdata() for m in ("t2", "flair")}

        def write(name, t2, flair, spacing=1.0):
            for modality, array in (("t2", t2), ("flair", flair)):
                path = tmp_path / "data" / name / f"{name}_{modality}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([spacing, spacing, spacing, 1])), path)

        write("usual", arrays["t2"], arrays["flair"])
        write("empty", arrays["t2"], np.zeros_like(arrays["flair"]))
        write("twice", arrays["t2"], arrays["t2"])
        write("large", arrays["t2"], arrays["flair"], spacing=1.5)
        write("dark", np.where(arrays["t2"] > 0, arrays["t2"] ** 3 / 255**2, 0), arrays["flair"])
        records = {r["case"]: r for r in grade(tmp_path / "out", learned, dataset_dir=str(tmp_path / "data"))}
        assert not records["usual"]["unsure"] and records["usual"]["flags"] == []
        for name in ("empty", "twice"):
            assert records[name]["grade"] is None and "a modality is missing" in records[name]["flags"][0]
        assert any(flag.startswith("unusual field of view: width") for flag in records["large"]["flags"])
        assert any(flag.startswith("unusual intensities: first_p50") for flag in records["dark"]["flags"])
        near = grade(
            tmp_path / "near", learned, threshold=records["usual"]["probability"] - 0.05, **self.files(patients)
        )
        assert near[0]["flags"] == ["probability within 0.1 of the threshold"]

    def test_label_classification(self, patients, learned, tmp_path):
        """What MONAI Label does with a bundle: preprocessing of one file, inferer, postprocessing, class scores."""
        volumes = [nib.load(path) for path in self.files(patients).values()]
        both = np.stack([volume.get_fdata() for volume in volumes], axis=-1)
        nib.save(nib.Nifti1Image(both, volumes[0].affine), tmp_path / "both.nii.gz")
        (tmp_path / "main.py").touch()
        weights, settings = str(learned / "model.pt"), {**COMMON, "source": "t2_flair"}
        label_model(str(tmp_path), bundle_root=str(BUNDLE), checkpoint=weights, **settings)
        model = tmp_path / "model" / "glioma_grading_classification"
        parser = ConfigParser()
        parser.read_config(model / "configs" / "inference.json")
        parser.config["bundle_root"] = str(model)
        data = {"image": str(tmp_path / "both.nii.gz"), "image_path": "both.nii.gz", "device": "cpu"}
        for transform in parser.get_parsed_content("preprocessing").transforms:
            data = transform(data)
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(torch.load(model / "models" / "model.pt", weights_only=True))
        with torch.inference_mode():
            pred = parser.get_parsed_content("inferer")(data["image"][None], network.eval())
        data["pred"] = pred[0]
        result = parser.get_parsed_content("postprocessing")(data)
        assert "image" not in result and result["pred"].shape == (2,)
        (record,) = grade(tmp_path / "out", learned, **self.files(patients))
        assert float(result["pred"][1]) == pytest.approx(record["probability"], abs=1e-5)
        assert float(result["pred"].sum()) == pytest.approx(1)


class TestChain:
    """Two raw files in, grade out, through the fusion bundle; and the same through files that it wrote."""

    @pytest.fixture(scope="class")
    def trained(self, few_patients, tiny_fusion, tmp_path_factory):
        folder = tmp_path_factory.mktemp("fused")
        settings = TRAIN | {"source": "fused", "num_folds": 2, **tiny_fusion[3]}
        run("train", dataset_dir=str(few_patients), output_dir=str(folder), **settings)
        return folder

    def test_same_as_fused_files(self, few_patients, tiny_fusion, trained, tmp_path):
        folder = few_patients / "HGG"
        fused = grade(tmp_path / "a", trained, source="fused", dataset_dir=str(folder), **tiny_fusion[3])
        # the fusion bundle's own command
        settings = {**tiny_fusion[3]["fusion_overrides"], "checkpoint": tiny_fusion[3]["fusion_weights"]}
        settings |= {"device": "cpu", "num_workers": 0, "dataset_dir": folder, "output_dir": tmp_path / "written"}
        result = run_command("inference", "volume", bundle=FUSION, cwd=tmp_path, **settings)
        assert result.returncode == 0, result.stderr[-3000:]
        files = grade(tmp_path / "b", trained, source="fused_files", dataset_dir=str(tmp_path / "written"))
        assert [r["case"] for r in files] == [r["case"] for r in fused] and len(files) == 12
        for one, other in zip(fused, files):
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-3)
        assert len({round(r["probability"], 4) for r in fused}) > 1, "they differ between patients"

    def test_another_fusion_network_is_flagged(self, few_patients, tiny_fusion, trained, tmp_path):
        weights = torch.load(tiny_fusion[3]["fusion_weights"], weights_only=True)
        weights["refinement.head.bias"] += 0.1
        torch.save(weights, tmp_path / "other.pt")
        settings = tiny_fusion[3] | {"fusion_weights": str(tmp_path / "other.pt"), "cache_dir": str(tmp_path / "cache")}
        files = TestInference().files(few_patients, "glioma_100")
        (record,) = grade(tmp_path / "out", trained, source="fused", **settings, **files)
        assert any("another fusion network" in flag for flag in record["flags"])

    def test_the_bundle_alone(self, few_patients, tmp_path):
        """Packed, with no fusion bundle beside it, it says in a sentence what is missing, and grades other sources."""
        bundle = tmp_path / "grading"
        shutil.copytree(BUNDLE, bundle, symlinks=False, ignore=shutil.ignore_patterns("__pycache__", "models"))
        settings = {"dataset_dir": few_patients, "output_dir": tmp_path / "out", **TRAIN, "num_folds": 2}
        result = run_command("train", bundle=bundle, cwd=tmp_path, run_id="training", **settings)
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert last.startswith("FileNotFoundError: No fusion bundle to make fused images with,")
        assert "set fusion_bundle to the folder of clinicalfmamba_fusion, or grade another source" in last
        result = run_command("train", bundle=bundle, cwd=tmp_path, source="average", **settings)
        assert result.returncode == 0, result.stderr[-3000:]
        assert (tmp_path / "out" / "model.pt").is_file()


class TestProperties:
    CONFIGS = {"train": ["train"], "evaluate": ["train", "evaluate"], "infer": ["inference"]}

    @pytest.mark.parametrize(
        "added", [(), ("volume",), ("densenet",), ("mamba",)], ids=["2d", "3d", "densenet", "mamba"]
    )
    @pytest.mark.parametrize("task", CONFIGS)
    def test_nothing_is_missing(self, few_patients, learned, tmp_path, task, added):
        # what training has written is looked for beside the checkpoint
        shutil.copy(learned / "operating_point.json", tmp_path)
        settings = {"source": "t2_flair", "dataset_dir": str(few_patients), "output_dir": str(tmp_path), "num_folds": 2}
        settings |= {"checkpoint": str(tmp_path / "model.pt"), "threshold": 0.5, "num_slices": 4, "device": "cpu"}
        settings |= {"spatial_dims": 2} if "volume" not in added else {}
        if task == "infer":
            settings["saliency_layer"] = {"mamba": "encoder", "densenet": "class_layers.relu"}.get(
                "".join(added), "layer3"
            )
        if "volume" in added:
            (tmp_path / "operating_point.json").unlink()
        kind = "infer" if task == "infer" else "train"
        flow = workflow(*self.CONFIGS[task], *added, kind=kind, **settings)
        assert flow.check_properties() == []
        for key in ("run", "training") if task != "infer" else ("run",):
            assert key in flow.parser

    def test_network_without_data(self, tmp_path):
        """As `monai.bundle.load` does."""
        shutil.copytree(BUNDLE, tmp_path / "grading", ignore=shutil.ignore_patterns("__pycache__", "models"))
        flow = ConfigWorkflow(str(tmp_path / "grading" / "configs" / "train.json"), logging_file=False, **NETWORK)
        flow.initialize()
        weights = flow.network_def.state_dict()
        (tmp_path / "grading" / "models").mkdir()
        torch.save(weights, tmp_path / "grading" / "models" / "model.pt")
        settings = {key.split("#")[1]: value for key, value in NETWORK.items()}
        loaded = monai.bundle.load("grading", bundle_dir=tmp_path, net_override=settings)
        assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("volume", [False, True], ids=["2d", "3d"])
    def test_input_and_output_are_as_described(self, volume, n):
        meta = json.loads((CONFIGS / "metadata.json").read_text())
        overrides = {"_meta_#network_data_format": meta["volume_data_format"]} if volume else {}
        files = [str(CONFIGS / f"{name}.json") for name in (["train", "volume"] if volume else ["train"])]
        monai.bundle.verify_net_in_out(
            "network_def", str(CONFIGS / "metadata.json"), files, device="cpu", n=n, **overrides
        )


class TestMistakes:
    """The last line that a failed command prints says what is wrong, and names the file."""

    def last_line(self, capsys, *configs, **overrides):
        with pytest.raises(RuntimeError) as error:
            run(*configs, **(COMMON | {"source": "t2", **overrides}))
        capsys.readouterr()
        sys.excepthook(error.type, error.value, error.tb)
        return capsys.readouterr().err.splitlines()[-1]

    def test_no_checkpoint(self, capsys, few_patients, tmp_path):
        settings = {"dataset_dir": str(few_patients), "output_dir": str(tmp_path / "out"), "num_folds": 2}
        for configs in (("train", "evaluate"), ("inference",)):
            line = self.last_line(capsys, *configs, checkpoint=str(tmp_path / "model.pt"), **settings)
            assert line.startswith(f"FileNotFoundError: Checkpoint {tmp_path / 'model.pt'} does not exist")

    def test_one_image_of_two(self, capsys, few_patients, learned, tmp_path):
        settings = {"checkpoint": str(learned / "model.pt"), "source": "t2_flair", "output_dir": str(tmp_path)}
        line = self.last_line(capsys, "inference", input_a="a_t2.nii.gz", **settings)
        assert line.startswith("ValueError: Give both images, input_a (T2) and input_b (FLAIR)")

    def test_weights_of_another_source(self, capsys, few_patients, learned, tmp_path):
        settings = {"checkpoint": str(learned / "model.pt"), "dataset_dir": str(few_patients)}
        line = self.last_line(capsys, "inference", source="average", output_dir=str(tmp_path), **settings)
        assert "were trained with source 't2_flair', not 'average'" in line

    def test_unknown_source(self, capsys, few_patients, tmp_path):
        settings = {"dataset_dir": str(few_patients), "output_dir": str(tmp_path), "source": "t1", "num_folds": 2}
        line = self.last_line(capsys, "train", **settings)
        assert line.startswith(
            "ValueError: source 't1' is none of t2, flair, t2_flair, average, maximum, fused_files, fused"
        )


class TestFiles:
    def test_metadata(self):
        """What MONAI Label asks for."""
        meta = json.loads((CONFIGS / "metadata.json").read_text())
        for data_format in (meta["network_data_format"], meta["volume_data_format"]):
            assert data_format["outputs"]["pred"]["channel_def"] == {"0": "LGG", "1": "HGG"}
            assert data_format["outputs"]["pred"]["format"] == "classes"
        pins = re.findall(r"(?m)^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text())
        packages = meta["required_packages_version"] | {
            "monai": meta["monai_version"],
            "torch": meta["pytorch_version"],
        }
        assert set(packages.items()) <= set(pins)

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
    def test_format(self, path):
        text = path.read_text()
        assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"

    def test_train_and_inference_prepare_alike(self):
        """The two configs stand alone, but what a network sees must be the same in both."""
        train, inference = (json.loads((CONFIGS / f"{name}.json").read_text()) for name in ("train", "inference"))
        assert inference["preprocessing"]["transforms"][1:] == train["load_image"]
        shared = ("source", "fusion_configs", "image_size", "num_slices", "min_brain", "lower_percentile", "pooling")
        for key in (*shared, "upper_percentile", "intensity_matching", "flip", "network_def", "fuse", "modalities"):
            assert train[key] == inference[key]

    def test_what_a_bundle_consists_of(self):
        for file in (
            "LICENSE",
            "configs/logging.conf",
            "configs/metadata.json",
            "docs/README.md",
            "docs/data_license.txt",
        ):
            assert (BUNDLE / file).is_file()
        assert os.readlink(BUNDLE / "custom_nets") == "../../custom_nets"
        # what both bundles need is written once, in the fusion bundle; copied with links followed, each stands alone
        links = [path for path in (BUNDLE / "scripts").iterdir() if path.is_symlink()]
        assert links and all(path.resolve() == FUSION / "scripts" / path.name and path.is_file() for path in links)
        assert "not for clinical use" in (BUNDLE / "docs" / "README.md").read_text().lower()
        assert all(path.stat().st_size < 25e6 for path in BUNDLE.rglob("*") if path.is_file()), "the zoo's limit"
