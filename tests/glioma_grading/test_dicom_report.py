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

import hashlib
import json
import logging
import shutil
import subprocess
import warnings

import numpy as np
import pydicom
import pytest
import torch
from dicom_samples import IDENTITY, write_series
from grading import COMMON, FUSION, names, run, run_command, workflow

from scripts import dicom_report
from scripts.cases import inference_cases
from scripts.dicom_report import DicomReporter
from scripts.dicom_series import select_series
from scripts.phantom import glioma
from scripts.sources import LoadImages, load_fused_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import highdicom.sr

AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])
UIDS = {"study", "series", "instances"}
SECRETS = [value for value in IDENTITY.values() if len(value) > 1]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A patient's T2 and FLAIR as DICOM series; FLAIR has one slice more."""
    folder = tmp_path_factory.mktemp("study") / "John_Doe"
    volumes = glioma("HGG", 1, (48, 56, 7))
    write_series(folder / "T2", volumes["t2"][..., :6].astype(np.uint16), "MR", 301, AFFINE)
    write_series(folder / "FLAIR", volumes["flair"].astype(np.uint16), "MR", 401, AFFINE)
    return folder


@pytest.fixture(scope="module")
def weights(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    settings = {**COMMON, "source": "fused_files", "dataset_dir": str(study), "threshold": 0.5}
    torch.manual_seed(0)
    network = workflow("inference", kind="infer", **settings).parser.get_parsed_content("network_def")
    torch.save(network.state_dict(), path)
    return path


def grade(out, weights, **overrides):
    settings = {**COMMON, "checkpoint": str(weights), "threshold": 0.5, "saliency": False, "dicom_report": "sr"}
    run("inference", kind="infer", output_dir=str(out), **settings | overrides)
    (record,) = json.loads((out / "grades.json").read_text())
    return record, out / record["case"]


def read_report(folder, case):
    return highdicom.sr.srread(folder / f"{case}_sr.dcm")


def referenced(report):
    """Study, series and instances of all that a structured report refers to."""
    return {
        (study.StudyInstanceUID, series.SeriesInstanceUID, instance.ReferencedSOPInstanceUID)
        for keyword in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence")
        for study in report.get(keyword, ())
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }


def triples(*references):
    return {(r["study"], r["series"], instance) for r in references for instance in r["instances"]}


class TestChain:
    """Two DICOM series in; fused series, grade and structured report out."""

    @pytest.fixture(scope="class")
    def graded(self, study, weights, tiny_fusion, tmp_path_factory):
        out = tmp_path_factory.mktemp("graded")
        return grade(out, weights, input_a=str(study / "T2"), input_b=str(study / "FLAIR"), **tiny_fusion[3])

    def test_json_names_the_fused_series_and_the_inputs(self, graded, study):
        record, folder = graded
        case = record["case"]
        content = json.loads((folder / f"{case}_grade.json").read_text())
        references = content.pop("references")
        assert content == record and content["notice"] == "Not for clinical use."
        fused = select_series(folder / f"{case}_dicom")
        assert references["fused"].keys() == UIDS and references["fused"]["study"] == IDENTITY["StudyInstanceUID"]
        assert references["fused"]["series"] == fused.uid
        assert references["fused"]["instances"] == [h.SOPInstanceUID for h in fused.headers]
        assert [i["series"] for i in references["inputs"]] == [select_series(study / n).uid for n in ("T2", "FLAIR")]
        assert [len(i["instances"]) for i in references["inputs"]] == [6, 7]

    def test_structured_report(self, graded, weights):
        record, folder = graded
        case = record["case"]
        report = read_report(folder, case)
        for keyword, value in IDENTITY.items():
            assert str(report[keyword].value) == value
        assert (report.Modality, report.VerificationFlag, report.PreliminaryFlag) == ("SR", "UNVERIFIED", "PRELIMINARY")
        assert "Not for clinical use." in report.SeriesDescription
        references = json.loads((folder / f"{case}_grade.json").read_text())["references"]
        assert referenced(report) == triples(references["fused"], *references["inputs"])
        (group,) = report.content.get_image_measurement_groups()
        values = {m.name.value: m.value for m in group.get_measurements()}
        assert values == {"HGGPROB": record["probability"], "HGGTHRES": record["threshold"]}
        assert [e.value.value for e in group.get_qualitative_evaluations()] == [record["grade"]]
        images = [image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for image in group.source_images]
        assert images == references["fused"]["instances"]
        texts = [item.TextValue for item in group[0].ContentSequence if item.ValueType == "TEXT"]
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        assert f"weights SHA-256 {digest}" in texts and record["weights"] == f"model.pt {digest[:12]}"
        assert {"Not for clinical use.", *record["flags"]} <= set(texts)

    def test_fused_series_tells_how_it_was_made(self, graded, tiny_fusion):
        record, folder = graded
        image = pydicom.dcmread(folder / f"{record['case']}_dicom" / "0001.dcm")
        digest = hashlib.sha256(open(tiny_fusion[3]["fusion_weights"], "rb").read()).hexdigest()
        assert image.DerivationDescription.startswith("Fusion of MR 301 and MR 401 by ClinicalFMamba ")
        assert digest in image.DerivationDescription and image.DerivationCodeSequence[0].CodeValue == "113085"

    def test_dciodvfy_finds_no_errors(self, graded):
        if shutil.which("dciodvfy") is None:
            pytest.skip("dciodvfy (Debian: dicom3tools) is not installed")
        record, folder = graded
        for file in (folder / f"{record['case']}_sr.dcm", folder / f"{record['case']}_dicom" / "0001.dcm"):
            checked = subprocess.run(["dciodvfy", "-new", file], capture_output=True, text=True)
            assert "Error" not in checked.stderr and ("SR" in checked.stderr or "MRImage" in checked.stderr)

    def test_anonymised(self, study, weights, tiny_fusion, tmp_path):
        originals = {h.SOPInstanceUID for n in ("T2", "FLAIR") for h in select_series(study / n).headers}
        files = {"input_a": str(study / "T2"), "input_b": str(study / "FLAIR"), "anonymise": True}
        record, folder = grade(tmp_path, weights, **files, **tiny_fusion[3])
        content = json.loads((folder / f"{record['case']}_grade.json").read_text())["references"]
        assert content["inputs"] == [] and len(content["fused"]["instances"]) == 6
        assert referenced(read_report(folder, record["case"])) == triples(content["fused"])
        for file in (path for path in folder.rglob("*") if path.is_file()):
            text = file.read_bytes().lower()
            # the date of the study stands in no UID either
            assert not any(value.lower().encode() in text for value in (*SECRETS, *originals))

    def test_identity_stays_in_dicom_and_json(self, study, weights, tiny_fusion, tmp_path, capfd, caplog):
        """Neither file names nor the summary nor what a run says have a UID or the patient."""
        shutil.copytree(study, tmp_path / "studies" / study.name)
        caplog.set_level(logging.INFO)
        grade(tmp_path / "out", weights, dataset_dir=str(tmp_path / "studies"), dicom_report="json", **tiny_fusion[3])
        written = names(tmp_path / "out")
        assert any(name.endswith("_grade.json") for name in written) and not any("_sr" in name for name in written)
        summary = [(tmp_path / "out" / f"grades.{kind}").read_text() for kind in ("json", "csv")]
        text = " ".join([*capfd.readouterr(), caplog.text, *written, *summary]).lower()
        assert "grading" in text and not any(secret.lower() in text for secret in (*SECRETS, study.name, "1.3.6.1.4."))


def test_nothing_is_named_unless_asked_for(study, weights, tmp_path):
    files = {"input_a": str(study / "T2"), "input_b": str(study / "FLAIR")}
    record, _ = grade(tmp_path, weights, source="average", dicom_report=None, **files)
    assert names(tmp_path) == ["grades.csv", "grades.json"] and record["case"].startswith("case_")


def test_without_a_fused_image_the_report_is_of_the_inputs(study, weights, tmp_path, recwarn, caplog):
    """And their headers may be as anonymisers leave them; no warning quotes them."""
    shutil.copytree(study, tmp_path / "study")
    for file in (tmp_path / "study").rglob("IM*"):
        image = pydicom.dcmread(file)
        image.PatientSex = "0000"
        image.PatientName = "Unlikely-Name"
        del image.AccessionNumber
        image.save_as(file)
    files = {"input_a": str(tmp_path / "study" / "T2"), "input_b": str(tmp_path / "study" / "FLAIR")}
    record, folder = grade(tmp_path / "out", weights, source="average", **files)
    references = json.loads((folder / f"{record['case']}_grade.json").read_text())["references"]
    assert references["fused"] is None and len(references["inputs"]) == 2
    report = read_report(folder, record["case"])
    assert referenced(report) == triples(*references["inputs"]) and report.PatientSex == ""
    assert not any("Unlikely" in told for told in (caplog.text, *(str(warning.message) for warning in recwarn)))


class TestFusedFiles:
    """What the fusion bundle's own command has written is graded."""

    @pytest.fixture(scope="class")
    def written(self, study, tiny_fusion, tmp_path_factory):
        out = tmp_path_factory.mktemp("written")
        settings = {**tiny_fusion[3]["fusion_overrides"], "checkpoint": tiny_fusion[3]["fusion_weights"]}
        settings |= {"device": "cpu", "num_workers": 0, "report": False, "output_dir": out}
        settings |= {"input_a": study / "T2", "input_b": study / "FLAIR"}
        result = run_command("inference", "volume", bundle=FUSION, cwd=out, **settings)
        assert result.returncode == 0, result.stderr[-3000:]
        return out

    def test_series_and_file_are_one_image(self, written, weights, tmp_path):
        (folder,) = (path for path in written.iterdir() if path.is_dir())
        series, file = folder / f"{folder.name}_dicom", folder / f"{folder.name}_fused.nii.gz"
        images = [load_fused_file(path) for path in (series, file)]
        # 12 bits of the series and 8 bits of the file
        assert (images[0] - images[1]).abs().max() < 1.01 / 255 and (images[0] != images[1]).float().mean() < 0.05
        np.testing.assert_allclose(images[0].affine, images[1].affine, atol=1e-5)
        reports = []
        for name, files in (("a", {"input_a": str(series)}), ("b", {"dataset_dir": str(written)})):
            record, out = grade(tmp_path / name, weights, source="fused_files", **files)
            assert record["case"] == folder.name
            content = json.loads((out / f"{folder.name}_grade.json").read_text())
            reports.append(content["references"])
            assert triples(content["references"]["fused"]) == referenced(read_report(out, folder.name))
        assert reports[0] == reports[1] and reports[0]["fused"]["series"] == select_series(series).uid
        assert [len(i["instances"]) for i in reports[0]["inputs"]] == [6, 7], "as the fused series says"

    def test_anonymised(self, written, weights, tmp_path):
        """The fused series is that of a patient, and so is not named."""
        settings = {"source": "fused_files", "dataset_dir": str(written), "anonymise": True}
        record, folder = grade(tmp_path, weights, **settings)
        content = json.loads((folder / f"{record['case']}_grade.json").read_text())
        assert content["references"] == {"fused": None, "inputs": []}
        assert names(folder) == [f"{record['case']}_grade.json"]


class TestRefusals:
    def test_images_of_different_patients(self, study, tmp_path):
        volume = glioma("HGG", 2)["flair"].astype(np.uint16)
        write_series(tmp_path / "other", volume, "MR", 501, AFFINE, PatientID="ANOTHER")
        with pytest.raises(ValueError, match="The two series are of different patients: choose other inputs"):
            LoadImages()([study / "T2", tmp_path / "other"])

    def test_not_a_fused_series(self, study):
        with pytest.raises(ValueError, match="is not a series that a fusion has written: name CASE_dicom"):
            load_fused_file(study / "T2")

    def test_one_of_two(self, study):
        with pytest.raises(ValueError, match="Give both images"):
            inference_cases(".", input_a=str(study / "T2"))

    def test_kind_and_packages(self, monkeypatch):
        settings = {"output_dir": "", "grades": None, "cases": [], "weights": ""}
        with pytest.raises(ValueError, match="dicom_report is 'pdf', but must be one of: json, sr"):
            DicomReporter(kind="pdf", **settings)
        monkeypatch.setattr(dicom_report, "HAS_HIGHDICOM", False)
        DicomReporter(kind="json", **settings)
        with pytest.raises(ValueError, match="needs highdicom: install it, or set dicom_report to 'json'"):
            DicomReporter(kind="sr", **settings)
