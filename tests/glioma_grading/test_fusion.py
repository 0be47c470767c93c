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

import importlib
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from grading import FUSION, TINY_FUSION
from monai.bundle import ConfigWorkflow

import scripts.fusion
from scripts.fusion import FuseModalitiesd, FusionBundle, own_scripts, to_eight_bit

FILES = ("glioma_100", "HGG")


@pytest.fixture
def files(few_patients):
    case, grade = FILES
    return [str(few_patients / grade / case / f"{case}_{modality}.nii.gz") for modality in ("t2", "flair")]


@pytest.fixture
def settings(tiny_fusion):
    return {"bundle": FUSION, "weights": tiny_fusion[3]["fusion_weights"], "overrides": TINY_FUSION}


class TestOwnScripts:
    def test_two_packages_of_one_name(self):
        ours, path = dict(sys.modules), list(sys.path)
        with own_scripts(FUSION):
            losses = importlib.import_module("scripts.losses")
            assert losses.__file__.startswith(str(FUSION))
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module("scripts.folds")
        assert sys.path == path
        assert {name: sys.modules.get(name) for name in ours if name.startswith("scripts")} == {
            name: module for name, module in ours.items() if name.startswith("scripts")
        }
        assert "scripts.losses" not in sys.modules
        # what was made inside goes on working
        fused, sources = torch.rand(1, 1, 16, 16), torch.rand(1, 2, 16, 16)
        assert losses.ClinicalFMambaLoss(2)(fused, sources) > 0

    def test_restored_after_an_error(self):
        before = sys.modules["scripts"]
        with pytest.raises(ZeroDivisionError), own_scripts(FUSION):
            importlib.import_module("scripts.losses")
            raise ZeroDivisionError
        assert sys.modules["scripts"] is before and "scripts.losses" not in sys.modules


class TestFuseModalitiesd:
    def test_as_the_fusion_bundle(self, files, settings):
        fused = FuseModalitiesd(**settings)({"image": files, "case": "a"})["image"]
        with own_scripts(FUSION):
            configs = [str(FUSION / "configs" / f"{name}.json") for name in ("inference", "volume")]
            flow = ConfigWorkflow(configs, logging_file=False, bundle_root=str(FUSION), device="cpu", **TINY_FUSION)
            network = flow.parser.get_parsed_content("network_def")
            network.load_state_dict(torch.load(settings["weights"], weights_only=True))
            pair = flow.parser.get_parsed_content("preprocessing")({"image": files})["image"]
            with torch.inference_mode():
                inferer = flow.parser.get_parsed_content("inferer")
                expected = inferer(pair.as_tensor()[None], network.eval())[0]
                whole = network(pair.as_tensor()[None])[0] * (pair.as_tensor() > 0).any(0)
        assert fused.shape == (1, 48, 56, 6) and fused.meta["case"] == "a"
        torch.testing.assert_close(fused.as_tensor(), to_eight_bit(expected), rtol=0, atol=0)
        torch.testing.assert_close(fused.as_tensor(), to_eight_bit(whole), rtol=0, atol=1.01 / 255)
        torch.testing.assert_close(fused.affine, pair.affine)

    def test_slices_of_a_volume(self, files, settings, tiny_fusion):
        settings = settings | {"weights": tiny_fusion[2]["fusion_weights"], "configs": ["configs/inference.json"]}
        volume = FuseModalitiesd(**settings)({"image": files})["image"].as_tensor()
        parts = FusionBundle(**{key: settings[key] for key in ("bundle", "configs", "weights", "overrides")})
        pair = parts.part("preprocessing")({"image": files})["image"].as_tensor()
        with torch.inference_mode():
            for z in (0, 5):
                expected = to_eight_bit(parts.load_network()(pair[None, ..., z]))[0] * (pair[..., z] > 0).any(0)
                torch.testing.assert_close(volume[..., z], expected, rtol=0, atol=1.01 / 255)

    def test_cache(self, files, settings, tmp_path, monkeypatch):
        cached = settings | {"cache_dir": tmp_path / "cache"}
        first = FuseModalitiesd(**cached)({"image": files})["image"]
        assert len(list((tmp_path / "cache").iterdir())) == 1, "one file, and no temporary one"
        # by content: a copy elsewhere is the same image
        copies = [shutil.copy(file, tmp_path) for file in files]
        monkeypatch.setattr(FusionBundle, "load_network", lambda self: pytest.fail("it was in the cache"))
        again = FuseModalitiesd(**cached)
        for paths in (files, copies):
            image = again({"image": paths})["image"]
            assert torch.equal(image.as_tensor(), first.as_tensor()) and torch.equal(image.affine, first.affine)
        # other images, other weights, another configuration
        with pytest.raises(pytest.fail.Exception):
            again({"image": files[::-1]})
        weights = torch.load(settings["weights"], weights_only=True)
        torch.save({name: value + 0.01 for name, value in weights.items()}, tmp_path / "other.pt")
        for other in ({"weights": tmp_path / "other.pt"}, {"overrides": {**TINY_FUSION, "upper_percentile": 99}}):
            with pytest.raises(pytest.fail.Exception):
                FuseModalitiesd(**cached | other)({"image": files})

    def test_interrupted_writing_leaves_no_half_file(self, files, settings, tmp_path, monkeypatch):
        def interrupted(path, **arrays):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        fuse = FuseModalitiesd(**settings, cache_dir=tmp_path)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(np, "savez_compressed", interrupted)
            fuse({"image": files})
        assert list(tmp_path.iterdir()) == []

    def test_prepared_before_workers_start(self, files, settings, tmp_path, monkeypatch):
        fuse = FuseModalitiesd(**settings, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(scripts.fusion, "get_worker_info", lambda: object())
        fuse.fusion.device = torch.device("cuda")
        with pytest.raises(RuntimeError, match="set a cache_dir, so that images are fused before"):
            fuse({"image": files})
        monkeypatch.undo()
        fuse.fusion.device = torch.device("cpu")
        fuse.prepare([{"image": files}])
        monkeypatch.setattr(scripts.fusion, "get_worker_info", lambda: object())
        fuse.fusion.device = torch.device("cuda")
        assert fuse({"image": files})["image"].shape == (1, 48, 56, 6)

    def test_pickled_for_workers(self, files, settings, tmp_path):
        fuse = FuseModalitiesd(**settings)
        expected = fuse({"image": files})["image"]
        copy = pickle.loads(pickle.dumps(fuse))
        assert copy.digest == fuse.digest
        assert torch.equal(copy({"image": files})["image"].as_tensor(), expected.as_tensor())


class TestMistakes:
    def test_no_bundle(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No fusion bundle to make fused images with") as error:
            FuseModalitiesd(bundle=tmp_path)
        assert str(error.value).count(". ") == 0, "one sentence"

    def test_no_weights(self, tmp_path, settings):
        with pytest.raises(FileNotFoundError, match="set fusion_weights"):
            FuseModalitiesd(**settings | {"weights": tmp_path / "none.pt"})

    def test_weights_of_another_network(self, files, settings):
        fuse = FuseModalitiesd(**settings | {"overrides": None})
        with pytest.raises(
            ValueError, match="do not belong together: Checkpoint .* another network than the ClinicalFMamba"
        ):
            fuse({"image": files})

    def test_systems(self, tmp_path, settings, files):
        with pytest.raises(ValueError, match="source 't1' is none of t2, flair"):
            FuseModalitiesd(**settings, system="t1")
        with pytest.raises(ValueError, match="name them as fusion_weights"):
            FuseModalitiesd(bundle=FUSION, system="clinicalfmamba")
        overrides = {"network_def#strides": [2, 2, 2], **TINY_FUSION}
        named = FuseModalitiesd(**settings | {"overrides": overrides}, system="clinicalfmamba")({"image": files})
        assert torch.equal(
            named["image"].as_tensor(), FuseModalitiesd(**settings)({"image": files})["image"].as_tensor()
        )
        # a config of the fusion bundle by its name
        shutil.copytree(FUSION, tmp_path / "fusion", ignore=shutil.ignore_patterns("models"))
        (tmp_path / "fusion" / "configs" / "other.json").write_text('{"upper_percentile": 90}')
        fuse = FuseModalitiesd(**settings | {"bundle": tmp_path / "fusion"}, system="other")
        (tmp_path / "fusion" / "configs" / "baselines").mkdir(exist_ok=True)
        (tmp_path / "fusion" / "configs" / "baselines" / "rival.json").write_text('{"upper_percentile": 80}')
        rival = FuseModalitiesd(**settings | {"bundle": tmp_path / "fusion"}, system="rival")
        assert rival.fusion.part("upper_percentile") == 80
        with pytest.raises(ValueError, match="source 'rival' is a network without weights of its own"):
            FuseModalitiesd(bundle=tmp_path / "fusion", system="rival")
        assert fuse.fusion.part("upper_percentile") == 90 and fuse.digest != FuseModalitiesd(**settings).digest
