"""The canonical problems of all suites, by name."""

from fungi.workloads import WORKLOADS as FUNGI
from fungi.workloads import Projecting
from knn.workloads import WORKLOADS as KNN
from knn.workloads import Search
from sort.workloads import WORKLOADS as SORT
from sort.workloads import Features, Sorting, TrainingLoss
from vera.workloads import WORKLOADS as VERA
from vera.workloads import Adapted
from workload import Workload, on_device

__all__ = [
    "WORKLOADS",
    "Adapted",
    "Features",
    "Projecting",
    "Search",
    "Sorting",
    "TrainingLoss",
    "Workload",
    "on_device",
]

WORKLOADS: dict[str, Workload] = SORT | KNN | FUNGI | VERA
