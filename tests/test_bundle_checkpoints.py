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

import sys

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.handlers import CheckpointLoader, IgniteMetricHandler
from monai.metrics import MAEMetric
from monai.transforms import Compose

from scripts.checkpoints import BestModelSaver, LastEpochSaver, check_file, load_weights
from scripts.errors import show_cause_last


@pytest.fixture(autouse=True)
def same_excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


class Validation:
    """Epochs of validation whose key metric is what the network's only weight says."""

    def __init__(self, folder):
        self.network = torch.nn.Linear(1, 1, bias=False)
        self.path = folder / "model.pt"
        self.saver = BestModelSaver(self.network, self.path)
        zero = torch.zeros(1, 1)
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader([{"image": torch.ones(1), "label": zero[0]}]),
            network=self.network,
            key_val_metric={"score": IgniteMetricHandler(MAEMetric(), output_transform=self.pred_and_label)},
            val_handlers=[self.saver],
        )

    @staticmethod
    def pred_and_label(output):
        return [item["pred"] for item in output], [item["label"] for item in output]

    def epoch(self, number, score):
        torch.nn.init.constant_(self.network.weight, score)
        self.evaluator.run(number)

    def saved(self):
        return torch.load(self.path, weights_only=True)["weight"].item()


class TestBestModelSaver:
    def test_keeps_the_best(self, tmp_path):
        validation = Validation(tmp_path / "new")
        for number, (score, best) in enumerate([(0.25, 0.25), (0.75, 0.75), (0.5, 0.75), (0.75, 0.75), (1.0, 1.0)], 1):
            validation.epoch(number, score)
            assert validation.saved() == best
        assert validation.saver.state_dict() == {"best_metric": 1.0, "best_metric_epoch": 5}
        assert [path.name for path in validation.path.parent.iterdir()] == ["model.pt"]

    def test_a_resumed_run_does_not_replace_a_better_model(self, tmp_path):
        first = Validation(tmp_path)
        first.epoch(1, 0.75)
        LastEpochSaver({"best": first.saver}, tmp_path / "last.pt")(first.evaluator)
        resumed = Validation(tmp_path)
        CheckpointLoader(str(tmp_path / "last.pt"), {"best": resumed.saver})(resumed.evaluator)
        for number, (score, best) in enumerate([(0.5, 0.75), (1.0, 1.0)], 2):
            resumed.epoch(number, score)
            assert resumed.saved() == best

    def test_has_no_state_before_it_is_attached(self, tmp_path):
        with pytest.raises(RuntimeError, match="before it is attached"):
            BestModelSaver(torch.nn.Linear(1, 1), tmp_path / "model.pt").state_dict()


class TestLastEpochSaver:
    def items(self):
        network = torch.nn.Linear(2, 1)
        return {"model": network, "optimizer": torch.optim.Adam(network.parameters())}

    def test_interval(self, tmp_path):
        items = self.items()
        evaluator = Validation(tmp_path).evaluator
        evaluator.state.max_epochs = 5
        saved = []
        LastEpochSaver(items, tmp_path / "last.pt", interval=2).attach(evaluator)
        evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda _: saved.append((tmp_path / "last.pt").exists()))
        for epoch in range(1, 4):
            evaluator.run(epoch)
        assert saved == [False, True, True]

    def test_the_old_file_stays_when_writing_fails(self, tmp_path, monkeypatch):
        items = self.items()
        saver = LastEpochSaver(items, tmp_path / "last.pt")
        saver(None)
        before = (tmp_path / "last.pt").read_bytes()

        def full(content, path):
            path.write_bytes(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="no space left"):
            saver(None)
        assert (tmp_path / "last.pt").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]

    def test_holds_nothing_but_tensors(self, tmp_path):
        items = self.items()
        LastEpochSaver(items, tmp_path / "last.pt")(None)
        loaded = torch.load(tmp_path / "last.pt", weights_only=True)
        assert loaded.keys() == items.keys()
        assert torch.equal(loaded["model"]["weight"], items["model"].weight)


@pytest.mark.parametrize("exists", ["", "folder"])
def test_a_file_must_exist(tmp_path, exists):
    path = tmp_path / "model.pt"
    if exists:
        path.mkdir()
    with pytest.raises(FileNotFoundError, match=f"Checkpoint {path} does not exist"):
        check_file(path)


def test_an_existing_file_passes(tmp_path):
    (tmp_path / "model.pt").touch()
    check_file(tmp_path / "model.pt")


class TestLoadWeights:
    def test_weights_alone_or_with_more(self, tmp_path):
        trained, network = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
        for content in (trained.state_dict(), {"model": trained.state_dict(), "optimizer": {"lr": 0.1}}):
            torch.save(content, tmp_path / "model.pt")
            torch.nn.init.zeros_(network.weight)
            assert load_weights(network, tmp_path / "model.pt") is network
            assert torch.equal(network.weight, trained.weight)

    def test_of_another_network(self, tmp_path):
        torch.save(torch.nn.Conv2d(2, 3, 3).state_dict(), tmp_path / "model.pt")
        network = torch.nn.Conv3d(2, 3, 3)
        before = network.weight.clone()
        with pytest.raises(ValueError) as error:
            load_weights(network, tmp_path / "model.pt")
        (sentence,) = str(error.value).splitlines()
        assert sentence.startswith(f"Checkpoint {tmp_path / 'model.pt'} is of another network than the Conv3d of these")
        assert "size mismatch for weight" in sentence and len(sentence) < 600
        assert torch.equal(network.weight, before)

    @pytest.mark.parametrize("damage", ["pointer", "truncated", "nothing"])
    def test_what_can_not_be_read(self, tmp_path, damage):
        path = tmp_path / "model.pt"
        torch.save(torch.nn.Linear(64, 64).state_dict(), path)
        contents = {"pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "nothing": b""}
        path.write_bytes(contents.get(damage, path.read_bytes()[:-2000]))
        with pytest.raises(ValueError, match=f"Checkpoint {path} can not be read"):
            load_weights(torch.nn.Linear(64, 64), path)


def fail(_=None):
    raise ValueError("a.png is broken.") from KeyError("detail")


class TestErrors:
    def printed(self, capsys, function):
        show_cause_last()
        try:
            function()
        except Exception:
            sys.excepthook(*sys.exc_info())
        return capsys.readouterr().err.splitlines()

    def test_below_a_config(self, capsys):
        config = {"data": {"_target_": "monai.data.Dataset", "data": "$list(map(@f, [1]))"}, "f": fail}
        lines = self.printed(capsys, lambda: ConfigParser(config).get_parsed_content("data"))
        assert "Traceback (most recent call last):" in lines, "where it happened is still shown"
        assert lines[-1] == "ValueError: a.png is broken."

    def test_below_a_transform(self, capsys):
        assert self.printed(capsys, lambda: Compose([fail])(1))[-1] == "ValueError: a.png is broken."

    def test_elsewhere_it_is_said_once(self, capsys):
        lines = self.printed(capsys, fail)
        assert lines[-1] == "ValueError: a.png is broken." and lines.count(lines[-1]) == 1

    def test_an_error_of_monai_itself(self, capsys):
        config = {"data": {"_target_": "monai.data.Dataset", "dat": []}}
        lines = self.printed(capsys, lambda: ConfigParser(config).get_parsed_content("data"))
        assert lines[-1].startswith("TypeError: ") and "'dat'" in lines[-1]
