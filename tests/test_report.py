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

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose
from PIL import Image

from scripts.colour_maps import ColourMapd
from scripts.metrics import EntropyMetric, FusionPSNRMetric, FusionSSIMMetric
from scripts.report import CaseMetrics, CaseTimer, SaveReportd
from scripts.report_images import colour_difference
from scripts.report_index import ReportIndex, write_index
from scripts.views import CaseImages

VOID = {"meta", "img", "input", "br", "link"}
HOSTILE = "<script>alert(1)<&\"'%20#.x"
METRICS = {"ssim": FusionSSIMMetric(), "psnr": FusionPSNRMetric(), "entropy": EntropyMetric()}
VALUES = {"ssim": 0.5125, "psnr": 21.25, "entropy": float("nan")}
INFO = {
    "case": "case1",
    "inputs": [
        {"name": "series 3", "modality": "MR", "shape": [40, 32], "spacing": [0.5, 0.5]},
        {"name": "/home/DOE^JANE/pet.nii", "modality": "PT", "shape": [20, 20], "spacing": [2.0, 2.0]},
    ],
    "registration": {
        "kind": "rigid",
        "translation_mm": [1.25, -2.0, 0.5],
        "rotation_deg": [0.1, 0.2, 3.0],
        "mutual_information": [0.31, 0.62],
        "overlap": [0.8, 0.97],
        "transform_file": "/home/DOE^JANE/case1.tfm",
    },
    "warnings": ["Registered, although they <claimed> to be."],
}


class Page(HTMLParser):
    """Reads a page as strictly as the parser allows: every element that opens closes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def item(*shape: int, case: str = "case1", seed: int = 0) -> dict:
    image = torch.zeros(2, *shape)
    inner = (slice(None), *(slice(n // 4, 3 * n // 4) for n in shape))
    image[inner] = torch.rand(image[inner].shape, generator=torch.Generator().manual_seed(seed))
    meta = {"case": case, "filename_or_obj": "/secret/DOE^JANE/t2.nii.gz", "PatientName": "DOE^JANE"}
    sources = MetaTensor(image, affine=torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0])), meta=meta)
    return {"image": sources, "pred": MetaTensor(image.amax(0, keepdim=True)).copy_meta_from(sources), "case": case}


def save(folder: Path, data: dict, case: str = "case1", **kwargs) -> tuple[Page, dict, str]:
    data = {"metrics": VALUES, **data}
    returned = SaveReportd(output_dir=folder, **kwargs)(data)
    assert returned.keys() == data.keys() and returned["pred"] is data["pred"]
    assert sorted(path.name for path in (folder / case).iterdir()) == [f"{case}_report.html", f"{case}_report.json"]
    text = (folder / case / f"{case}_report.html").read_text(encoding="utf-8")
    return Page(text), json.loads((folder / case / f"{case}_report.json").read_text(encoding="utf-8")), text


def picture(uri: str | None) -> np.ndarray:
    kind, content = str(uri).split(",", 1)
    assert kind in ("data:image/png;base64", "data:image/webp;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def without_pictures(text: str) -> str:
    return re.sub(r"base64,[^\"]*", "", text)


def check_self_contained(text: str, page: Page) -> None:
    assert not re.search(r"https?:|//\w|url\(|@import|\bfetch\(|XMLHttpRequest", without_pictures(text))
    assert not page.all("link") and all("src" not in script for script in page.all("script"))
    assert all(str(image["src"]).startswith("data:image/") for image in page.all("img"))
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'; img-src data:;")
    assert page.all("html")[0]["lang"] == "en" and any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "Not for clinical use." in page.words


def test_slice(tmp_path: Path) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    data = item(40, 32)
    page, record, text = save(tmp_path / "out", data, checkpoint=weights)
    check_self_contained(text, page)
    images = page.all("img")
    assert [i["alt"] for i in images] == ["MRI", "Partner", "Fused", "Checkerboard", "Fused \N{MINUS SIGN} MRI"]
    mri, _, fused, _, difference = (picture(i["src"]) for i in images)
    # without loss and upright
    np.testing.assert_array_equal(mri, np.rint(255 * data["image"].numpy()[0].T))
    np.testing.assert_array_equal(fused, np.rint(255 * data["pred"].numpy()[0].T))
    expected = colour_difference((data["pred"] - data["image"][:1]).numpy()[0].T, 0.5)
    np.testing.assert_array_equal(difference, np.rint(255 * expected))
    # pixels are 1 x 2 mm
    assert "aspect-ratio: 0.6250" in text and not page.all("canvas") and not page.all("script")

    assert record["metrics"] == {"ssim": 0.5125, "psnr": 21.25, "entropy": None}, "JSON has no NaN"
    assert all(f"{value:.3f}" in page.words for value in (0.5125, 21.25))
    sha = hashlib.sha256(b"weights").hexdigest()
    assert record["provenance"]["weights"] == {"file": "model.pt", "sha256": sha} and sha in page.words
    for word in ("model.pt", f"PyTorch {torch.__version__}", "ClinicalFMamba", "CPU, ", "40 × 32", "1.00 × 2.00"):
        assert word in page.words
    assert record["warnings"] == [] and "Warnings" not in page.words and record["seconds"] is None


def test_what_happened_before_is_told_without_paths(tmp_path: Path) -> None:
    page, record, text = save(tmp_path, item(40, 32) | {"fusion_info": INFO})
    assert page.all("img")[0]["alt"] == "MR" and page.all("img")[1]["alt"] == "PT"
    for words in (
        "Registered, although they <claimed> to be.",
        "series 3 MR 40 × 32 0.50 × 0.50",
        "pet.nii PT 20 × 20",
    ):
        assert words in page.words
    for words in ("1.25, -2.0, 0.5", "0.1, 0.2, 3.0", "0.310 before, 0.620 after", "0.800 before, 0.970 after"):
        assert words in page.words
    assert record["warnings"] == INFO["warnings"] and record["registration"]["transform_file"] == "case1.tfm"
    text = without_pictures(text)
    for secret in ("DOE", "JANE", "secret", "/home", str(tmp_path)):
        assert secret not in text and secret not in without_pictures(json.dumps(record))


def test_info_as_a_loader_leaves_it(tmp_path: Path) -> None:
    """Collated and taken apart again, an empty list is None."""
    page, record, _ = save(tmp_path, item(40, 32) | {"fusion_info": {"warnings": None, "inputs": None}})
    assert record["warnings"] == [] and [source["name"] for source in record["inputs"]] == ["MRI", "Partner"]


@pytest.mark.parametrize("colour", ["grey", "chroma", "map"])
def test_volume(tmp_path: Path, colour: str) -> None:
    data = item(40, 36, 30)
    if colour == "chroma":
        data |= {
            "chroma": torch.rand(2, 40, 36, 30),
            "pred": MetaTensor(torch.rand(3, 40, 36, 30), meta=data["pred"].meta),
        }
    if colour == "map":
        data = ColourMapd(colormap="hot_iron")(data)
    page, record, text = save(tmp_path, data)
    check_self_contained(text, page)
    assert len(page.all("img")) == 15 and len(page.all("input")) == 3
    assert [cut["data-plane"] for cut in page.all("div") if "data-plane" in cut] == ["axial", "coronal", "sagittal"]
    viewer = json.loads(re.findall(r'<script type="application/json" id="volume">(.*?)</script>', text)[0])
    assert viewer["size"] == [24, 22, 19] and viewer["total"] == [40, 36, 30]

    # the mosaics hold the axial slices of the volume as it is seen
    images = CaseImages.of_item(data).as_seen().cropped()[0]
    stacks = {"mri", "partner", "fused"} | ({"grey"} if colour != "grey" else set())
    assert set(viewer["stacks"]) == stacks
    for name in stacks:
        stack, volume = viewer["stacks"][name], images.images[name]
        assert stack["channels"] == volume.shape[0] and len(stack["mosaics"]) == 2
        tiles = [picture(uri).astype(float) / 255 for uri in stack["mosaics"]]
        for index in (0, 7, 16):
            row, column = divmod(index % 16, 4)
            tile = tiles[index // 16][22 * row : 22 * row + 22, 24 * column : 24 * column + 24]
            expected = volume[..., index].permute(2, 1, 0).numpy()
            # noise is the hardest to compress
            assert np.abs(tile.mean(axis=-1) - expected.mean(axis=-1)).mean() < 0.15
            assert tile.mean() == pytest.approx(expected.mean(), abs=0.03)


def test_slab_and_large_volume(tmp_path: Path) -> None:
    page, _, _ = save(tmp_path / "slab", item(40, 40, 4))
    assert len(page.all("img")) == 5 and len(page.all("input")) == 1
    *_, text = save(tmp_path / "large", item(640, 16, 16))
    viewer = json.loads(re.findall(r'id="volume">(.*?)</script>', text)[0])
    assert max(viewer["size"]) == 256 and viewer["step"][0] == pytest.approx(324 / 256)


def test_what_is_wrong_with_the_images(tmp_path: Path) -> None:
    data = item(16, 16)
    data["image"][1] = 0
    data["pred"][0, 0, 0] = float("nan")
    page, record, _ = save(tmp_path, data)
    assert record["warnings"] == [
        "Partner is empty: it has one value only.",
        "The fused image holds values that are no numbers.",
    ]
    assert all(warning in page.words for warning in record["warnings"])


def test_hostile_names(tmp_path: Path) -> None:
    data = item(40, 32, case=HOSTILE) | {"fusion_info": {"warnings": ["</style><b>x"], "inputs": [{"modality": "<i>"}]}}
    page, _, text = save(tmp_path, data, case=HOSTILE)
    write_index(tmp_path)
    index = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    for each in (page, index):
        assert HOSTILE in each.words and "</style><b>x" in each.words and not each.all("b") and not each.all("i")
    assert "alert" not in "".join(re.findall(r"<script.*?</script>", text, re.DOTALL))
    (link,) = {attributes["href"] for attributes in index.all("a")}
    assert (
        link
        == "%3Cscript%3Ealert%281%29%3C%26%22%27%2520%23.x/%3Cscript%3Ealert%281%29%3C%26%22%27%2520%23.x_report.html"
    )


def evaluator_of(items: list[dict], folder: Path, *handlers: object) -> SupervisedEvaluator:
    """Evaluator of batches of two, whose network gives the mean of its sources."""
    sources = [{k: v for k, v in item.items() if k != "pred"} for item in items]
    return SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(sources), batch_size=2),
        network=torch.nn.Identity(),
        inferer=lambda inputs, network: inputs.mean(1, keepdim=True),
        postprocessing=Compose([SaveReportd(output_dir=folder)]),
        val_handlers=list(handlers),
    )


def record_of(folder: Path, case: str) -> dict:
    return json.loads((folder / case / f"{case}_report.json").read_text())


def test_the_network_is_timed(tmp_path: Path) -> None:
    timer = CaseTimer()
    evaluator_of([item(16, 16)], tmp_path, timer).run()
    seconds = record_of(tmp_path, "case1")["seconds"]
    assert 0 < seconds < 30 and seconds == timer.seconds


class TestCaseMetrics:
    def test_each_image_has_its_own(self, tmp_path: Path) -> None:
        items = [item(24, 20, case=f"c{seed}", seed=seed) for seed in range(3)]
        items[1]["image"][0, 3, 3] = float("nan")
        evaluator_of(items, tmp_path, CaseMetrics(METRICS)).run()
        for number in (0, 2):
            sources = items[number]["image"].as_tensor()[None]
            found = record_of(tmp_path, f"c{number}")["metrics"]
            assert list(found) == list(METRICS)
            for name, metric in METRICS.items():
                assert found[name] == pytest.approx(float(metric(sources.mean(1, keepdim=True), sources)))
                metric.reset()
        assert record_of(tmp_path, "c1")["metrics"] == dict.fromkeys(METRICS)

    def test_where_the_memory_of_a_gpu_ends(self, tmp_path: Path) -> None:
        class Full(FusionSSIMMetric):
            calls = 0

            def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                if self.calls == 1:
                    raise torch.cuda.OutOfMemoryError
                return super().scores(fused, sources)

        metric = Full()
        evaluator_of([item(24, 20)], tmp_path, CaseMetrics({"ssim": metric})).run()
        assert metric.calls == 2 and 0 < record_of(tmp_path, "case1")["metrics"]["ssim"] < 1


class TestIndex:
    def test_sums_up_what_is_there(self, tmp_path: Path) -> None:
        save(tmp_path, item(40, 32, case="b"), case="b")
        SaveReportd(output_dir=tmp_path)(item(40, 32, case="a") | {"fusion_info": INFO})
        write_index(tmp_path)
        text = (tmp_path / "index.html").read_text(encoding="utf-8")
        page = Page(text)
        check_self_contained(text, page)
        assert "2 fused cases" in page.words and "failed.csv" not in page.words
        assert [a["href"] for a in page.all("a") if "tabindex" not in a] == ["a/a_report.html", "b/b_report.html"]
        assert "MR + PT" in page.words and INFO["warnings"][0] in page.words
        # one of the two has no metrics
        # one of the two has no metrics, the other no entropy
        assert page.words.count("–") == 3 + 2 + 2 and "SSIM" in page.words
        assert max(picture(image["src"]).shape[:2] == (96, 60) for image in page.all("img"))

        (tmp_path / "failed.csv").write_text("case\n")
        (tmp_path / "b" / "b_report.json").write_text("{")
        with pytest.warns(UserWarning, match="b_report.json is not valid JSON"):
            write_index(tmp_path)
        words = Page((tmp_path / "index.html").read_text(encoding="utf-8")).words
        assert "1 fused case " in words and "failed.csv" in words
        assert not list(tmp_path.rglob(".*")), "a temporary file is left"

    def run(self, folder: Path, cases: list[str], seen: list[int] | None = None) -> None:
        evaluator = evaluator_of([item(16, 16, case=case) for case in cases], folder, ReportIndex(folder, interval=0))
        if seen is not None:
            evaluator.add_event_handler("ITERATION_COMPLETED", lambda _: seen.append(self.rows(folder)))
        evaluator.run()

    @staticmethod
    def rows(folder: Path) -> int:
        return len(Page((folder / "index.html").read_text(encoding="utf-8")).all("tr")) - 1

    def test_grows_with_a_run_and_survives_a_resumed_one(self, tmp_path: Path) -> None:
        seen: list[int] = []
        self.run(tmp_path, ["c1", "c2", "c3"], seen=seen)
        assert seen == [2, 3] and self.rows(tmp_path) == 3
        self.run(tmp_path, ["c3", "c4"])
        assert self.rows(tmp_path) == 4

    def test_not_on_the_way_before_it_is_time(self, tmp_path: Path) -> None:
        engine = Engine(lambda engine, batch: None)
        written = []
        handler = ReportIndex(tmp_path, interval=3600)
        handler.attach(engine)
        handler._write_if_due(engine)
        written.append((tmp_path / "index.html").stat().st_mtime_ns)
        handler._write_if_due(engine)
        written.append((tmp_path / "index.html").stat().st_mtime_ns)
        handler(engine)
        written.append((tmp_path / "index.html").stat().st_mtime_ns)
        assert written[0] == written[1] < written[2]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to run the pages' scripts")
class TestInABrowser:
    def dom(self, page: Path, tmp_path: Path, script: str) -> str:
        """The page's elements after its own scripts and then ``script`` ran."""
        text = page.read_text(encoding="utf-8")
        copy = page.with_name("scripted.html")
        copy.write_text(text.replace("</body>", f"<script>setTimeout(() => {{{script}}}, 2000)</script></body>"))
        command = [
            str(CHROMIUM),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'p'}",
        ]
        command += ["--virtual-time-budget=6000", "--dump-dom", copy.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def test_slider_moves_through_the_volume(self, tmp_path: Path) -> None:
        data = item(40, 36, 30)
        # grey, but for one bright slice: the nineteenth from above
        data["image"][0] = 0.5 * (data["image"][1] > 0)
        data["image"][0, 10:30, 9:27, 29 - 18] = 1
        data["pred"] = MetaTensor(data["image"][:1]).copy_meta_from(data["image"])
        save(tmp_path, data)
        script = """
            const cut = document.querySelector("[data-plane=axial]");
            const slider = cut.querySelector("input");
            const canvas = cut.querySelector(".mri canvas");
            const level = () => canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data[0];
            document.title = [0, 6, 12, slider.max].map((slice) => {
                slider.value = slice;
                slider.dispatchEvent(new Event("input"));
                return `${cut.querySelector("output").textContent}: ${level()}`;
            }).join("; ");
        """
        title = re.findall(
            "<title>(.*?)</title>", self.dom(tmp_path / "case1" / "case1_report.html", tmp_path, script)
        )[0]
        levels = {label: int(level) for label, level in (entry.split(": ") for entry in title.split("; "))}
        assert list(levels) == ["slice 7 of 30", "slice 13 of 30", "slice 19 of 30", "slice 25 of 30"]
        dark, grey, bright, below = levels.values()
        assert max(dark, below) < 20 and 100 < grey < 160 and bright > 230

    def test_table_sorts(self, tmp_path: Path) -> None:
        for index, case in enumerate(("c10", "c2", "c1")):
            SaveReportd(output_dir=tmp_path)(item(24, 24, case=case) | {"metrics": {"ssim": 0.5 + index / 10}})
        SaveReportd(output_dir=tmp_path)(item(24, 24, case="none"))
        write_index(tmp_path)
        script = """
            const button = (column) => document.querySelectorAll("thead tr > *")[column].querySelector("button");
            const cases = () => [...document.querySelectorAll("tbody th")].map((cell) => cell.textContent).join(",");
            const read = [cases()];
            for (const column of [1, 1, 3, 3]) { button(column).click(); read.push(cases()); }
            document.title = read.join("; ");
        """
        title = re.findall("<title>(.*?)</title>", self.dom(tmp_path / "index.html", tmp_path, script))[0]
        scores = {
            path.name[:-12]: json.loads(path.read_text())["metrics"].get("ssim") for path in tmp_path.glob("*/*.json")
        }
        del scores["none"]
        ascending = sorted(scores, key=lambda case: scores[case])
        assert title.split("; ") == [
            "c1,c10,c2,none",
            "none,c10,c2,c1",
            "c1,c2,c10,none",
            ",".join([*ascending, "none"]),
            ",".join([*ascending[::-1], "none"]),
        ]
