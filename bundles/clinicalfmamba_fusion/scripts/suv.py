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
"""Standardised uptake values: what makes PET images of different patients and doses comparable."""

from __future__ import annotations

from datetime import datetime, timedelta

from pydicom.dataset import Dataset
from pydicom.valuerep import DA, DT, TM

__all__ = ["SUV_KEYWORDS", "suv_factor"]

SUV_KEYWORDS = (
    *("Units", "CorrectedImage", "DecayCorrection", "RadiopharmaceuticalInformationSequence", "PatientWeight"),
    *("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime"),
)


def suv_factor(header: Dataset) -> float | None:
    """
    Factor from the stored unit (after rescaling) to the SUV by body weight in g/ml, from the header of one slice: the
    weight over the dose that was left when the scan began. After the vendor-neutral recipe of QIBA's FDG-PET/CT
    profile, without its private tags.

    Returns:
        1 for images that hold SUV already (``Units`` GML), the factor for images in Bq/ml that are corrected for
        attenuation and decay, and ``None`` where anything that is needed is missing or the image is no PET.
    """
    if header.get("Modality") != "PT":
        return None
    if header.get("Units") == "GML":
        return 1.0
    if header.get("Units") != "BQML" or not {"ATTN", "DECY"} <= set(header.get("CorrectedImage") or ()):
        return None
    weight = float(header.get("PatientWeight") or 0)
    injections = header.get("RadiopharmaceuticalInformationSequence") or [Dataset()]
    dose = float(injections[0].get("RadionuclideTotalDose") or 0)
    if weight <= 0 or dose <= 0:
        return None
    if header.get("DecayCorrection") == "ADMIN":
        return weight * 1000 / dose
    half_life = float(injections[0].get("RadionuclideHalfLife") or 0)
    elapsed = _seconds_since_injection(header, injections[0])
    if header.get("DecayCorrection") != "START" or half_life <= 0 or elapsed is None:
        return None
    return weight * 1000 / (dose * 2 ** (-elapsed / half_life))


def _seconds_since_injection(header: Dataset, injection: Dataset) -> float | None:
    scan = _moment(header.get("SeriesDate"), header.get("SeriesTime"))
    acquired = _moment(header.get("AcquisitionDate"), header.get("AcquisitionTime"))
    # a series that was processed later has the time of that, and only the acquisition tells the beginning
    if scan is None or (acquired is not None and acquired < scan):
        scan = acquired
    if scan is None:
        return None
    started = injection.get("RadiopharmaceuticalStartDateTime")
    injected = DT(str(started)).replace(tzinfo=None) if started else None
    if injected is None:
        injected = _moment(scan.strftime("%Y%m%d"), injection.get("RadiopharmaceuticalStartTime"))
        if injected is not None and injected > scan:  # before midnight
            injected -= timedelta(days=1)
    elapsed = None if injected is None else (scan - injected).total_seconds()
    return elapsed if elapsed is not None and elapsed >= 0 else None


def _moment(date: str | None, time: str | None) -> datetime | None:
    if not date or not time:
        return None
    return datetime.combine(DA(str(date)), TM(str(time)))  # type: ignore[arg-type]
