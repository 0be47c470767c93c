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

from scripts.metrics.base import FusionMetric, SlicewiseMetric
from scripts.metrics.feature_mutual_information import FeatureMutualInformationMetric
from scripts.metrics.feature_similarity import FeatureSimilarityMetric
from scripts.metrics.information import (
    EntropyMetric,
    FloatEntropyMetric,
    MutualInformationMetric,
    NormalizedMutualInformationMetric,
    VisualInformationFidelityMetric,
)
from scripts.metrics.similarity import (
    CorrelationCoefficientMetric,
    EdgePreservationMetric,
    FusionMultiScaleSSIMMetric,
    FusionPSNRMetric,
    FusionSSIMMetric,
    SumOfCorrelationDifferencesMetric,
    WorseSourceSSIMMetric,
)
from scripts.metrics.statistics import AverageGradientMetric, SpatialFrequencyMetric, StandardDeviationMetric

__all__ = [
    "AverageGradientMetric",
    "CorrelationCoefficientMetric",
    "EdgePreservationMetric",
    "EntropyMetric",
    "FeatureMutualInformationMetric",
    "FeatureSimilarityMetric",
    "FloatEntropyMetric",
    "FusionMetric",
    "FusionMultiScaleSSIMMetric",
    "FusionPSNRMetric",
    "FusionSSIMMetric",
    "MutualInformationMetric",
    "NormalizedMutualInformationMetric",
    "SlicewiseMetric",
    "SpatialFrequencyMetric",
    "StandardDeviationMetric",
    "SumOfCorrelationDifferencesMetric",
    "VisualInformationFidelityMetric",
    "WorseSourceSSIMMetric",
]
