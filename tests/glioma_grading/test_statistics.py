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
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as reference

from scripts.operating_point import choose_threshold, read_operating_point, update_operating_point
from scripts.predictions import OperatingPointSaver, read_predictions, write_predictions
from scripts.quality import find_flags
from scripts.statistics import METRICS, bootstrap_intervals, delong_test, grading_metrics, patients


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    labels = (rng.random(200) < 0.7).astype(int)
    # rounded, so that scores tie
    return labels, np.round(np.clip(0.25 * labels + 0.75 * rng.random(200), 0, 1), 1)


def test_as_scikit_learn(sample):
    labels, scores = sample
    decisions = (scores >= 0.55).astype(int)
    found = grading_metrics(labels, scores, decisions)
    expected = {
        "auc": reference.roc_auc_score(labels, scores),
        "average_precision": reference.average_precision_score(labels, scores),
        "brier": reference.brier_score_loss(labels, scores),
        "f1": reference.f1_score(labels, decisions),
        "accuracy": reference.accuracy_score(labels, decisions),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, decisions),
        "sensitivity": reference.recall_score(labels, decisions),
        "specificity": reference.recall_score(labels, decisions, pos_label=0),
    }
    assert tuple(found) == METRICS
    for name, value in expected.items():
        assert found[name] == pytest.approx(value)


def test_calibration_error():
    labels = np.array([0, 1, 1, 1, 0, 0])
    scores = np.array([0.75, 0.75, 0.75, 0.75, 0.2, 0.2])
    decisions = np.ones(6, dtype=int)
    # three quarters of the first four are positive, none of the others
    assert grading_metrics(labels, scores, decisions)["ece"] == pytest.approx(0.2 * 2 / 6)
    assert grading_metrics(labels, np.ones(6), decisions)["ece"] == pytest.approx(0.5)


def test_intervals_cover_the_truth():
    """Of 30 samples from a population whose AUC is known, about 95 % of the intervals have it inside."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(30):
        labels = np.repeat([0, 1], 40)
        scores = rng.normal(labels * 1.0)  # AUC = Phi(1 / sqrt(2))
        low, high = bootstrap_intervals(labels, scores, (scores > 0.5).astype(int), samples=100)["auc"]
        inside += low <= 0.7602 <= high
    assert 25 <= inside <= 30


def test_delong_has_the_level_that_it_says():
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], [40, 60])
    truth = labels + rng.normal(size=(400, 100))
    p = np.array([delong_test(labels, t + rng.normal(size=100), t + rng.normal(size=100))[1] for t in truth])
    assert 0.02 < (p < 0.05).mean() < 0.09 and 0.4 < (p < 0.5).mean() < 0.6


def test_delong_sees_a_difference(sample):
    labels, scores = sample
    noise = np.random.default_rng(3).random(200)
    difference, p = delong_test(labels, scores, noise)
    expected = reference.roc_auc_score(labels, scores) - reference.roc_auc_score(labels, noise)
    assert difference == pytest.approx(expected) and p < 0.001
    assert delong_test(labels, noise, scores) == pytest.approx((-difference, p))
    assert delong_test(labels, scores, 2 * scores + 1) == (0, 1), "only ranks count"


def test_several_cases_of_a_patient():
    rows = [("a", 0.2, 0.5), ("a", 0.4, 0.5), ("b", 0.7, 0.6)]
    records = [{"subject": s, "label": int(s == "b"), "probability": p, "threshold": t} for s, p, t in rows]
    labels, probabilities, decisions = patients(records)
    assert labels.tolist() == [0, 1] and probabilities.tolist() == pytest.approx([0.3, 0.7])
    assert decisions.tolist() == [0, 1]


class TestThreshold:
    def test_between_the_classes(self):
        assert choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9]) == pytest.approx(0.4)
        # 0.5 leaves one mistake, every other place more
        assert choose_threshold([0, 1, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.6, 0.9]) == pytest.approx(0.5)

    def test_one_value_or_one_grade(self):
        assert choose_threshold([0, 1], [0.3, 0.3]) == pytest.approx(0.3)
        with pytest.raises(ValueError, match="validation cases of both grades"):
            choose_threshold([1, 1], [0.3, 0.4])

    def test_auc_of_tied_probabilities(self, tmp_path):
        """MONAI's is a NumPy number then."""
        engine = SimpleNamespace(state=SimpleNamespace(epoch=2, best_metric_epoch=2, best_metric=np.float32(0.75)))
        records = [{"label": label, "probability": 0.5} for label in (0, 1)]
        OperatingPointSaver(tmp_path / "point.json", {"source": "t2"}).finish(engine, records)
        point = json.loads((tmp_path / "point.json").read_text())
        assert point["source"] == "t2" and point["validation"] == {"cases": 2, "epoch": 2, "auc": 0.75}

    def test_file(self, tmp_path):
        path = tmp_path / "operating_point.json"
        with pytest.raises(FileNotFoundError, match="operating_point.json does not exist"):
            read_operating_point(path, "fused")
        assert read_operating_point(path, "fused", threshold=0.3) == {"threshold": 0.3, "ranges": {}}
        update_operating_point(path, {"threshold": 0.4, "source": "fused", "pooling": "mean"})
        update_operating_point(path, {"ranges": {"area": [1, 2]}})
        assert json.loads(path.read_text())["threshold"] == 0.4
        assert read_operating_point(path, "fused_files", pooling="mean")["ranges"] == {"area": [1, 2]}
        assert read_operating_point(path, "fused", threshold=0.7)["threshold"] == 0.7
        with pytest.raises(ValueError, match="trained with source 'fused', not 't2'"):
            read_operating_point(path, "t2")
        with pytest.raises(ValueError, match="trained with pooling 'mean', not 'max'"):
            read_operating_point(path, "fused", pooling="max")
        update_operating_point(path, {"source": "t2"})
        with pytest.raises(ValueError, match="trained with source 't2', not 'fused_files'"):
            read_operating_point(path, "fused_files")


def test_flags():
    ranges = {"area": [100, 200], "first_p50": [0.4, 0.6]}
    usual = {"blank": 0, "identical": 0, "area": 220, "first_p50": 0.36}
    assert find_flags(usual, ranges) == []
    assert find_flags(usual | {"area": 230}, ranges)[0].startswith(
        "unusual field of view: area 230, in training 100 to"
    )
    assert find_flags(usual | {"first_p50": 0.2}, ranges)[0].startswith("unusual intensities: first_p50 0.2")
    assert find_flags({"blank": 0, "identical": 0, "area": 150, "fused_p50": 9}, ranges) == [], "not of the pair"
    assert find_flags(usual | {"blank": 1}, ranges) == ["an image is empty: a modality is missing"]


def test_predictions_are_read_as_written(tmp_path):
    record = {
        "fold": 2,
        "case": "a,b",
        "subject": "a",
        "label": 1,
        "probability": 1 / 3,
        "threshold": 0.5,
        "slices": "brain",
    }
    write_predictions(tmp_path / "p.csv", [record])
    assert read_predictions(tmp_path / "p.csv") == [record]
